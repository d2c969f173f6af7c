"""Which rank holds which part of a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from npu_rec.ops.random import random_key

PlacementName = Literal["row_wise", "table_wise", "column_wise", "replicated"]


@dataclass(frozen=True)
class Block:
    """Rows `first_row` to `last_row` and columns `first_column` to `last_column` (ends excluded) of a table."""

    first_row: int
    last_row: int
    first_column: int
    last_column: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.last_row - self.first_row

    @property
    def columns(self) -> int:
        """How many."""
        return self.last_column - self.first_column


class Placement(ABC):
    """Answers, for every rank alike, who holds what of one table."""

    by_columns = False  # whether the ranks' answers lie beside each other, and not one after the other

    @abstractmethod
    def width(self, rank: int) -> int:
        """Columns that `rank` answers with."""

    @abstractmethod
    def ask(self, ids: Tensor) -> tuple[Tensor, list[int]]:
        """How ranks are asked for distinct ascending `ids [U]`: places in `ids` by rank, and how many go to each."""


class BlockPlacement(Placement):
    """Blocks of a table of a fixed number of rows; they are cut like those of `torch.chunk`."""

    def __init__(self, kind: PlacementName, num_rows: int, dim: int, ranks: int, owner: int = 0) -> None:
        """`owner`: the rank of a table that is placed whole (`table_wise`)."""
        self.kind, self.num_rows, self.dim, self.ranks, self.owner = kind, num_rows, dim, ranks, owner
        self.by_columns = kind == "column_wise" and ranks > 1
        self.row_chunk = max(1, -(-num_rows // ranks)) if kind == "row_wise" else max(1, num_rows)
        self.column_chunk = -(-dim // ranks) if kind == "column_wise" else dim

    def block(self, rank: int) -> Block:
        """What `rank` holds."""
        rows, columns = (0, self.num_rows), (0, self.dim)
        if self.kind == "row_wise":
            rows = _chunk(rank, self.row_chunk, self.num_rows)
        elif self.kind == "column_wise":
            columns = _chunk(rank, self.column_chunk, self.dim)
        elif self.kind == "table_wise" and rank != self.owner:
            rows = (0, 0)
        return Block(*rows, *columns)

    def width(self, rank: int) -> int:
        return self.block(rank).columns

    def ask(self, ids: Tensor) -> tuple[Tensor, list[int]]:
        places = torch.arange(ids.shape[0])
        if self.kind == "column_wise":
            return places.repeat(self.ranks), [ids.shape[0]] * self.ranks
        counts = [0] * self.ranks
        if self.kind == "table_wise":
            counts[self.owner] = ids.shape[0]
            return places, counts
        ends = torch.arange(1, self.ranks + 1) * self.row_chunk
        cuts = [0, *torch.searchsorted(ids, ends).tolist()]
        return places, [b - a for a, b in pairwise(cuts)]


class HashPlacement(Placement):
    """Rows by a hash of their id: keys of 64 bits, which are in no order that could be cut."""

    def __init__(self, dim: int, ranks: int) -> None:
        self.dim, self.ranks = dim, ranks

    def width(self, rank: int) -> int:
        return self.dim

    def owner_of(self, ids: Tensor) -> Tensor:
        """`ids [U]` -> `[U]` the rank of each."""
        return (random_key(0, "owner", ids) >> 33) % self.ranks

    def ask(self, ids: Tensor) -> tuple[Tensor, list[int]]:
        owners = self.owner_of(ids)
        return torch.argsort(owners, stable=True), torch.bincount(owners, minlength=self.ranks).tolist()


def _chunk(rank: int, chunk: int, total: int) -> tuple[int, int]:
    return min(rank * chunk, total), min((rank + 1) * chunk, total)
