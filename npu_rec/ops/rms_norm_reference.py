"""`rms_norm` in plain PyTorch, and its request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend


@dataclass(frozen=True)
class RMSNormRequest:
    """Arguments of `rms_norm` (shapes there)."""

    x: Tensor
    weight: Tensor
    eps: float

    @staticmethod
    def sample(device: torch.device) -> RMSNormRequest:
        """A small request: T = 4, C = 16."""
        return RMSNormRequest(torch.zeros(4, 16, device=device), torch.ones(16, device=device), 1e-6)


def _normalised(request: RMSNormRequest) -> tuple[Tensor, Tensor, Tensor]:
    """x / rms `[T, C]`, 1 / rms `[T, 1]` and the weight, in float32 at least."""
    dtype = torch.float64 if request.x.dtype == torch.float64 else torch.float32
    x = request.x.to(dtype)
    rstd = torch.rsqrt(x.square().mean(1, keepdim=True) + request.eps)
    return x * rstd, rstd, request.weight.to(dtype)


def forward(request: RMSNormRequest) -> Tensor:
    """`[T, C]`."""
    normalised, _, weight = _normalised(request)
    return (normalised * weight).to(request.x.dtype)


def backward(request: RMSNormRequest, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    normalised, rstd, weight = _normalised(request)
    grad = grad.to(normalised.dtype)
    d_normalised = grad * weight
    along = (d_normalised * normalised).mean(1, keepdim=True)
    dx = rstd * (d_normalised - normalised * along)
    return dx.to(request.x.dtype), (grad * normalised).sum(0).to(request.weight.dtype)


BACKEND = Backend("reference", forward, backward)
