"""`dropout` in plain PyTorch, and its request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops import random
from npu_rec.ops.registry import Backend


@dataclass(frozen=True)
class DropoutRequest:
    """Arguments of `dropout` (shapes there); of the backward pass, with the gradient in place of x."""

    x: Tensor
    keys: Tensor
    probability: float

    @staticmethod
    def sample(device: torch.device) -> DropoutRequest:
        """A small request: T = 4, C = 16."""
        x, keys = torch.zeros(4, 16, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        return DropoutRequest(x, keys, 0.1)


def forward(request: DropoutRequest) -> Tensor:
    """`[T, C]`."""
    return random.dropout(request.x, request.probability, request.keys)


def backward(request: DropoutRequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    return (random.dropout(grad, request.probability, request.keys),)


BACKEND = Backend("reference", forward, backward)
