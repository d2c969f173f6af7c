"""One call of `sampled_softmax_loss`, as its backends receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampledSoftmaxRequest:
    """Arguments of `sampled_softmax_loss` (shapes there)."""

    queries: Tensor
    rows: Tensor
    positives: Tensor
    negatives: Tensor
    log_q: Tensor | None
    temperature: float
    mask_collisions: bool

    @staticmethod
    def sample(device: torch.device) -> SampledSoftmaxRequest:
        """A small request: T = 4, R = 2, U = 8, D = 16."""
        queries, rows = torch.zeros(4, 16, device=device), torch.zeros(8, 16, device=device)
        positives, negatives = (
            torch.zeros(4, dtype=torch.int64, device=device),
            torch.ones(4, 2, dtype=torch.int64, device=device),
        )
        return SampledSoftmaxRequest(queries, rows, positives, negatives, None, 0.05, True)

    def check(self) -> None:
        """Raise ValueError when an index lies outside `rows`; on an accelerator indices are trusted."""
        if self.rows.shape[0] == 0 and self.positives.numel():
            raise ValueError(f"rows has no row (U = 0) for {self.positives.numel()} tokens")
        if self.positives.device.type != "cpu":
            return
        for name, index in (("positives", self.positives), ("negatives", self.negatives)):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.rows.shape[0]:
                raise ValueError(f"{name} must index rows 0..{self.rows.shape[0] - 1}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.queries.dtype == torch.float64 else torch.float32
