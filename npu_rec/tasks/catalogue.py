"""The items that are ranked and drawn, as columns 0, 1, 2, ..., on the host and on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Catalogue:
    """Item ids, ascending, at least one; the place of an item is its column.

    Args:
        items: `[C]` int64, or the range of ids from 1 on, which takes no memory however long it is.
    """

    def __init__(self, items: Tensor | range) -> None:
        self._range = items if isinstance(items, range) else None
        self._on: dict[torch.device, Tensor] = {} if isinstance(items, range) else {items.device: items}
        self._host = items

    def __len__(self) -> int:
        return len(self._host)

    def all_items(self, device: torch.device) -> Tensor:
        """`[C]` item ids."""
        if self._range is not None:
            return torch.arange(self._range.start, self._range.stop, device=device)
        if device not in self._on:
            assert isinstance(self._host, Tensor)
            self._on[device] = self._host.to(device)
        return self._on[device]

    def items(self, columns: Tensor) -> Tensor:
        """Item ids of columns, of any shape."""
        if self._range is not None:
            return columns + self._range.start
        return self.all_items(columns.device)[columns]

    def column(self, items: Tensor) -> Tensor:
        """Columns of item ids, of any shape; -1 outside the catalogue."""
        if self._range is not None:
            known = (items >= self._range.start) & (items < self._range.stop)
            return torch.where(known, items - self._range.start, -1)
        ids = self.all_items(items.device)
        place = torch.searchsorted(ids, items).clamp_max(len(self) - 1)
        return torch.where(ids[place] == items, place, -1)
