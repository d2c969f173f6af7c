"""One call of `norm_gate`, as its backends receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormGateRequest:
    """Arguments of `norm_gate` (shapes there)."""

    x: Tensor
    gate: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dropout_keys: Tensor | None
    eps: float
    dropout: float

    @staticmethod
    def sample(device: torch.device) -> NormGateRequest:
        """A small request: T = 4, C = 16."""
        x, keys = torch.zeros(4, 16, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        return NormGateRequest(x, x, None, None, keys, 1e-6, 0.1)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32
