"""`rotary` in C++ for the CPU (kernels/cpu): heads are read where they are, by their strides."""

from __future__ import annotations

from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.registry import Backend
from npu_rec.ops.rotary_reference import RotaryRequest


def supports(request: RotaryRequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU."""
    return unusable(request.x, request.cos, request.sin)


def _turned(x: Tensor, request: RotaryRequest, back: bool) -> Tensor:
    out: Tensor = extension().rotary_turn(x, request.cos, request.sin, request.interleaved, back, instruction_set())
    return out


def forward(request: RotaryRequest) -> Tensor:
    """`[T, H, D]`."""
    return _turned(request.x, request, False)


def backward(request: RotaryRequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    return (_turned(grad.to(request.x.dtype), request, True),)


BACKEND = Backend("cpp", forward, backward, supports)
