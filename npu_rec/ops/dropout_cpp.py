"""`dropout` in C++ for the CPU (kernels/cpu): hash and product in one pass, no mask in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.dropout_reference import DropoutRequest
from npu_rec.ops.registry import Backend


def supports(request: DropoutRequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU."""
    return unusable(request.x)


def _dropped(x: Tensor, request: DropoutRequest) -> Tensor:
    # the comparison and the multiplier of `npu_rec.ops.random.dropout_scale`, which is rounded to the dtype of x
    largest_dropped = min(round(request.probability * 2**31), 2**31 - 1) - 1
    scale = torch.tensor(1.0 / (1.0 - request.probability), dtype=torch.float32).to(x.dtype).item()
    out: Tensor = extension().dropout_forward(x, request.keys, largest_dropped, scale, instruction_set())
    return out


def forward(request: DropoutRequest) -> Tensor:
    """`[T, C]`."""
    return _dropped(request.x, request)


def backward(request: DropoutRequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    return (_dropped(grad, request),)


BACKEND = Backend("cpp", forward, backward, supports)
