"""Norms over the channels of packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npu_rec.ops import rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467); `x [T, C]` -> `[T, C]`.

    Attributes:
        weight: `[C]`, ones at first; with affine=False they stay so and are no parameter.
    """

    def __init__(self, width: int, eps: float, *, affine: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        if affine:
            self.weight = nn.Parameter(torch.ones(width))
        else:
            self.register_buffer("weight", torch.ones(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, backend=self.backend)
