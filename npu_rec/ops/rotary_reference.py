"""`rotary` in plain PyTorch, and its request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend


@dataclass(frozen=True)
class RotaryRequest:
    """Arguments of `rotary` (shapes there)."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool

    @staticmethod
    def sample(device: torch.device) -> RotaryRequest:
        """A small request: T = 4, H = 2, D = 16."""
        x, angle = torch.zeros(4, 2, 16, device=device), torch.zeros(4, 16, device=device)
        return RotaryRequest(x, angle.cos(), angle.sin(), False)


def _factors(request: RotaryRequest) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, D]`, in float32 at least."""
    dtype = torch.float64 if request.x.dtype == torch.float64 else torch.float32
    return request.cos.to(dtype).unsqueeze(1), request.sin.to(dtype).unsqueeze(1)


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def forward(request: RotaryRequest) -> Tensor:
    """`[T, H, D]`."""
    cos, sin = _factors(request)
    x = request.x.to(cos.dtype)
    return (x * cos + _turned(x, request.interleaved) * sin).to(request.x.dtype)


def backward(request: RotaryRequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x; turning is undone by turning the other way."""
    cos, sin = _factors(request)
    grad = grad.to(cos.dtype)
    return ((grad * cos - _turned(grad * sin, request.interleaved)).to(request.x.dtype),)


BACKEND = Backend("reference", forward, backward)
