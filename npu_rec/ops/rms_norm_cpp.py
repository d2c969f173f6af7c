"""`rms_norm` in C++ for the CPU (kernels/cpu): nothing is kept for the backward pass."""

from __future__ import annotations

from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.registry import Backend
from npu_rec.ops.rms_norm_reference import RMSNormRequest


def supports(request: RMSNormRequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU."""
    return unusable(request.x, request.weight)


def forward(request: RMSNormRequest) -> Tensor:
    """`[T, C]`."""
    out: Tensor = extension().rms_norm_forward(request.x, request.weight, request.eps, instruction_set())
    return out


def backward(request: RMSNormRequest, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    dx, d_weight = extension().rms_norm_backward(grad, request.x, request.weight, request.eps, instruction_set())
    return dx, d_weight


BACKEND = Backend("cpp", forward, backward, supports)
