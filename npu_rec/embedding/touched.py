"""Which ids were looked up in training since a mark."""

from __future__ import annotations

import torch
from torch import Tensor

_UNSORTED = 1 << 20  # ids gathered before equal ones are brought together


class Touched:
    """A growing set of ids."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._distinct = 0

    def add(self, ids: Tensor) -> None:
        """`ids [n]` int64, any device, may repeat."""
        self._parts.append(ids)
        if sum(part.shape[0] for part in self._parts) > max(_UNSORTED, 2 * self._distinct):
            self._parts = [torch.unique(torch.cat(self._parts))]
            self._distinct = self._parts[0].shape[0]

    def ids(self) -> Tensor:
        """`[n]` distinct ids, ascending, on the host."""
        if not self._parts:
            return torch.zeros(0, dtype=torch.int64)
        self._parts = [torch.unique(torch.cat(self._parts))]
        self._distinct = self._parts[0].shape[0]
        return self._parts[0].cpu()

    def take(self) -> Tensor:
        """`ids`; from now on the set is empty."""
        ids = self.ids()
        self._parts, self._distinct = [], 0
        return ids
