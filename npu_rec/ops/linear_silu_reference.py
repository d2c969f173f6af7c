"""`linear_silu` in plain PyTorch, and its request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from npu_rec.ops.registry import Backend
from npu_rec.ops.silu import silu


@dataclass(frozen=True)
class LinearSiluRequest:
    """Arguments of `linear_silu` (shapes there); `dtype` is what the product is computed in."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    splits: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def sample(device: torch.device) -> LinearSiluRequest:
        """A small request: T = 4, K = 16, four parts of 16."""
        x, weight = torch.zeros(4, 16, device=device), torch.zeros(64, 16, device=device)
        return LinearSiluRequest(x, weight, None, (16, 16, 16, 16), x.dtype)


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, splits: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The parts, by PyTorch's own differentiable functions."""
    return torch.split(silu(linear(x, weight, bias)), list(splits), dim=1)


def forward(request: LinearSiluRequest) -> tuple[tuple[Tensor, ...], Tensor]:
    """The parts `[T, split]` and the product before SiLU, `[T, N]`."""
    product = linear(request.x, request.weight, None if request.bias is None else request.bias.to(request.dtype))
    return tuple(part.contiguous() for part in torch.split(silu(product), list(request.splits), dim=1)), product


def backward(request: LinearSiluRequest, product: Tensor, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias."""
    d_product = torch.ops.aten.silu_backward(torch.cat(grads, 1), product)
    d_bias = None if request.bias is None else d_product.sum(0).to(request.bias.dtype)
    return d_product @ request.weight, d_product.t() @ request.x, d_bias


BACKEND = Backend("reference", forward, backward)
