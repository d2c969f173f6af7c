"""Tables of item vectors, and their rows in the memory of this rank's device."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from npu_rec.distributed import World
from npu_rec.distributed.world import ALONE
from npu_rec.embedding.column_update import lookup_columns
from npu_rec.embedding.placement import BlockPlacement, HashPlacement, Placement
from npu_rec.embedding.touched import Touched
from npu_rec.ops import RowOptimizer, embedding_lookup
from npu_rec.ops.random import random_key, random_truncated_normal

_ROWS_AT_ONCE = 1 << 16


Part = tuple[Tensor, tuple[int, ...], tuple[int, ...]]
"""A block of a bigger tensor: its values, where it begins in the whole, the shape of the whole."""


@dataclass(frozen=True)
class TableSpec:
    """One table, wherever its rows are.

    Attributes:
        num_rows: V; ids are 0..V-1. None for a dynamic table, whose ids are any int64.
        dim: D.
        std: deviation of the initial values, a truncated normal.
        seed: row r starts as a pure function of (seed, name, r), so a table that grows, or is cut over ranks,
            starts the same.
    """

    name: str
    num_rows: int | None
    dim: int
    seed: int
    std: float = 0.02

    def initial_rows(self, ids: Tensor) -> Tensor:
        """`ids [n]` -> `[n, D]` float32, on the device of ids."""
        keys = random_key(self.seed, "rows", zlib.crc32(self.name.encode()), ids)
        return random_truncated_normal(keys, self.dim, self.std)


class EmbeddingTable(nn.Module, ABC):
    """What a rank holds of a table. `EmbeddingCollection` asks the ranks for rows and puts them together.

    Attributes:
        optimizer: updates the rows in the backward pass; None: their gradient is an ordinary one.
        touched: collects the ids of this rank's rows that training looks up; None: nobody wants to know.
    """

    needs_plan: ClassVar[bool]

    def __init__(self, spec: TableSpec, placement: Placement, rank: int, backend: str) -> None:
        super().__init__()
        self.spec, self.placement, self.rank, self.backend = spec, placement, rank, backend
        self.optimizer: RowOptimizer | None = None
        self.touched: Touched | None = None

    @abstractmethod
    def plan(self, ids: Tensor, counts: Tensor, step: int) -> tuple[Tensor, Any]:
        """On the host, before step `step`: which local rows the ids are in.

        Args:
            ids: `[R]` int64 that this rank holds, repeated where several ranks ask for one.
            counts: `[R]` int64 occurrences of each in the batches.

        Returns:
            `[R]` int64 local rows (-1: answered, but not trained), and what `rows` must do first.
        """

    @abstractmethod
    def rows(self, slots: Tensor, changes: Any) -> Tensor:
        """`slots [R]` on the device, of `plan` -> `[R, columns]`, differentiable."""

    @abstractmethod
    def read(self, ids: Tensor) -> Tensor:
        """`ids [R]` on the host -> `[R, columns]` on the device: the rows as they are, without a gradient."""

    @abstractmethod
    def use(self, optimizer: RowOptimizer) -> None:
        """Let the backward pass update the rows."""

    def owns(self, ids: Tensor) -> Tensor:
        """Which of `ids [n]` have their row on this rank, `[n]` bool."""
        placement = self.placement
        if isinstance(placement, HashPlacement):
            return placement.owner_of(ids) == self.rank
        assert isinstance(placement, BlockPlacement)
        block = placement.block(self.rank)
        return (ids >= block.first_row) & (ids < block.last_row)

    def shards(self) -> dict[str, Part]:
        """`weight`, and the optimiser's `square` and `momentum` where they are: this rank's blocks of them.

        Empty for tables whose rows are known by id.
        """
        return {}

    def counters(self) -> dict[str, float]:
        """What metrics show of this rank's part."""
        return {}

    def open_tier(self, folder: Path) -> None:
        """Make the memory below the device's, if the table has one; `folder` is for its files."""

    def close(self) -> None:
        """Let go of what `open_tier` opened."""


class StaticTable(EmbeddingTable):
    """`weight`: this rank's block of a table `[V, D]`, a parameter in the memory of its device."""

    needs_plan = False
    placement: BlockPlacement

    def __init__(self, spec: TableSpec, placement: BlockPlacement, world: World = ALONE, backend: str = "auto") -> None:
        super().__init__(spec, placement, world.rank, backend)
        self.world = world
        self.block = placement.block(world.rank)
        self.weight = nn.Parameter(torch.empty(self.block.rows, self.block.columns))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every row its initial value; without data (`meta`) there is nothing to do."""
        if self.weight.is_meta:
            return
        block = self.block
        for start in range(block.first_row, block.last_row, _ROWS_AT_ONCE):
            ids = torch.arange(start, min(start + _ROWS_AT_ONCE, block.last_row))
            rows = self.spec.initial_rows(ids)[:, block.first_column : block.last_column]
            self.weight[start - block.first_row :][: len(ids)] = rows.to(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids [T]` on the device -> `[T, D]`, where this rank holds the whole table."""
        return embedding_lookup(self.weight, ids, optimizer=self.optimizer, backend=self.backend)

    def plan(self, ids: Tensor, counts: Tensor, step: int) -> tuple[Tensor, None]:
        return ids - self.block.first_row, None

    def rows(self, slots: Tensor, changes: None) -> Tensor:
        if self.optimizer is not None and self.placement.by_columns:
            return lookup_columns(self.weight, slots, self.optimizer, self.spec.dim, self.world)
        return self.forward(slots)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        where = (ids - self.block.first_row).to(self.weight.device)
        rows: Tensor = self.weight.detach().index_select(0, where)
        return rows

    def use(self, optimizer: RowOptimizer) -> None:
        self.optimizer = optimizer
        optimizer.prepare(self.weight)

    def shards(self) -> dict[str, Part]:
        block, (rows, columns) = self.block, (self.placement.num_rows, self.spec.dim)
        corner = (block.first_row, block.first_column)
        parts: dict[str, Part] = {"weight": (self.weight.detach(), corner, (rows, columns))}
        if self.optimizer is not None and self.optimizer.square is not None:
            parts["square"] = (self.optimizer.square, corner[:1], (rows,))
        if self.optimizer is not None and self.optimizer.momentum is not None:
            parts["momentum"] = (self.optimizer.momentum, corner, (rows, columns))
        return parts
