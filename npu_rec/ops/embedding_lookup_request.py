"""One call of `embedding_lookup`, as its backends receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.row_optimizer import RowUpdate


@dataclass(frozen=True)
class EmbeddingLookupRequest:
    """Arguments of `embedding_lookup` (shapes there).

    A backend's `backward(request, grad [T, D])` returns `(gradient of table,)`; with `update` set it changes
    `table` and the state in `update` in place instead and returns `(None,)`.
    """

    table: Tensor
    ids: Tensor
    update: RowUpdate | None = None

    @staticmethod
    def sample(device: torch.device) -> EmbeddingLookupRequest:
        """A small request: V = 8, D = 16, T = 4."""
        return EmbeddingLookupRequest(torch.zeros(8, 16, device=device), torch.arange(4, device=device))

    def check(self) -> None:
        """Raise ValueError when an update does not fit, IndexError when an id lies outside the table.

        On an accelerator ids are trusted.
        """
        if self.update is not None:
            self.update.check(self.table)
        if self.ids.device.type == "cpu" and self.ids.numel():
            low, high = (int(x) for x in self.ids.aminmax())
            if low < 0 or high >= self.table.shape[0]:
                raise IndexError(
                    f"ids reach from {low} to {high}: out of range of a table of {self.table.shape[0]} rows"
                )
