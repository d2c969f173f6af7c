"""`swiglu` in C++ for the CPU (kernels/cpu): one pass over the rows."""

from __future__ import annotations

from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.registry import Backend
from npu_rec.ops.swiglu_reference import SwiGLURequest


def supports(request: SwiGLURequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU."""
    return unusable(request.x)


def forward(request: SwiGLURequest) -> Tensor:
    """`[T, C]`."""
    out: Tensor = extension().swiglu_forward(request.x, instruction_set())
    return out


def backward(request: SwiGLURequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    return (extension().swiglu_backward(grad, request.x, instruction_set()),)


BACKEND = Backend("cpp", forward, backward, supports)
