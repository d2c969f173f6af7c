"""The items that are ranked and drawn, as columns 0, 1, 2, ..., on the host and on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Catalogue:
    """`[C]` item ids, ascending, at least one; the place of an item is its column."""

    def __init__(self, items: Tensor) -> None:
        self._on = {items.device: items}
        self._host = items

    def __len__(self) -> int:
        return self._host.shape[0]

    def all_items(self, device: torch.device) -> Tensor:
        """`[C]` item ids."""
        if device not in self._on:
            self._on[device] = self._host.to(device)
        return self._on[device]

    def items(self, columns: Tensor) -> Tensor:
        """Item ids of columns, of any shape."""
        return self.all_items(columns.device)[columns]

    def column(self, items: Tensor) -> Tensor:
        """Columns of item ids, of any shape; -1 outside the catalogue."""
        known = self.all_items(items.device)
        place = torch.searchsorted(known, items).clamp_max(len(self) - 1)
        return torch.where(known[place] == items, place, -1)
