"""`swiglu` in plain PyTorch, and its request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend


@dataclass(frozen=True)
class SwiGLURequest:
    """Arguments of `swiglu` (shapes there)."""

    x: Tensor

    @staticmethod
    def sample(device: torch.device) -> SwiGLURequest:
        """A small request: T = 4, C = 16."""
        return SwiGLURequest(torch.zeros(4, 32, device=device))


def _halves(request: SwiGLURequest) -> tuple[Tensor, Tensor, Tensor]:
    """Both halves and the sigmoid of the first, `[T, C]` each, in float32 at least."""
    dtype = torch.float64 if request.x.dtype == torch.float64 else torch.float32
    a, b = request.x.to(dtype).chunk(2, 1)
    return a, b, torch.sigmoid(a)


def forward(request: SwiGLURequest) -> Tensor:
    """`[T, C]`."""
    a, b, gate = _halves(request)
    return (a * gate * b).to(request.x.dtype)


def backward(request: SwiGLURequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    a, b, gate = _halves(request)
    grad = grad.to(a.dtype)
    da = grad * b * gate * (1.0 + a * (1.0 - gate))
    return (torch.cat([da, grad * a * gate], 1).to(request.x.dtype),)


BACKEND = Backend("reference", forward, backward)
