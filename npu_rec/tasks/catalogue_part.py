"""The columns of a catalogue that one rank scores, and the vectors of their items."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from npu_rec.distributed import World
from npu_rec.embedding import EmbeddingCollection
from npu_rec.models.encoder import unit
from npu_rec.tasks.catalogue import Catalogue

ELEMENTS_AT_ONCE = 1 << 26  # numbers of a matrix of scores, or of vectors that are read, at once
KEPT_BYTES = 1 << 30  # a rank keeps its vectors between batches up to so many bytes, and else reads them each time


class CataloguePart:
    """This rank's columns, `first` to `last` (excluded): `size` of them, but the last parts may have fewer, or none.

    Parts are cut as `torch.chunk` does, and dealt so that most rows of a row-wise table are on the rank itself, with
    replicas too.

    Args:
        table: its name in `tables`.
        elements, kept_bytes: limits, as above.

    Attributes:
        owners: the rank of each part.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tables: EmbeddingCollection,
        table: str,
        world: World,
        elements: int = ELEMENTS_AT_ONCE,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.catalogue, self.tables, self.table, self.elements = catalogue, tables, table, elements
        self.dim = tables.tables[table].spec.dim
        self.size = -(-len(catalogue) // world.size)
        groups = tables.replicas.size
        in_group = world.size // groups
        self.owners = [part % groups * in_group + part // groups for part in range(world.size)]
        mine = self.owners.index(world.rank)
        self.first, self.last = (min(part * self.size, len(catalogue)) for part in (mine, mine + 1))
        self._keeps = 4 * self.size * self.dim <= kept_bytes  # alike on all ranks
        self._kept: Tensor | None = None

    def forget(self) -> None:
        """The rows have changed."""
        self._kept = None

    def vectors(self, columns: Tensor) -> Tensor:
        """`columns [n]` of this part -> `[n, E]` float32 of length 1; collective."""
        return self._all(columns.device)[columns - self.first] if self._keeps else self._read(columns)

    def chunks(self, width: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """First column and vectors `[width, E]` of each chunk, fewer in the last one; collective, to the end."""
        for start, block in [(self.first, self._all(device))] if self._keeps else self._blocks(width, device):
            for first in range(0, block.shape[0], width):
                yield start + first, block[first : first + width]

    def _all(self, device: torch.device) -> Tensor:
        """`[P, E]` float32, read once."""
        if self._kept is None:
            self._kept = torch.empty(self.last - self.first, self.dim, device=device)
            for start, block in self._blocks(1, device):
                self._kept[start - self.first :][: block.shape[0]] = block
        return self._kept

    def _blocks(self, width: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """First column and vectors of blocks of a multiple of `width` columns, as many on all ranks."""
        at_once = max(1, self.elements // (self.dim * width)) * width
        where = torch.device("cpu") if self.tables.needs_plan else device  # lookups are planned on the host
        for start in range(self.first, self.first + self.size, at_once):
            start, end = min(start, self.last), min(start + at_once, self.last)
            yield start, self._read(torch.arange(start, end, device=where))

    def _read(self, columns: Tensor) -> Tensor:
        return unit(self.tables.read(self.table, self.catalogue.items(columns)).float())
