"""`norm_gate` in C++ for the CPU (kernels/cpu): a row is read once and nothing is kept for the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.norm_gate_request import NormGateRequest
from npu_rec.ops.registry import Backend


def supports(request: NormGateRequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU."""
    if request.gate.dtype != request.x.dtype:
        return f"x is {request.x.dtype}, gate {request.gate.dtype}"
    return unusable(request.x, request.gate, request.weight, request.bias)


def _arguments(request: NormGateRequest) -> tuple[Any, ...]:
    keys = request.dropout_keys if request.dropout > 0.0 else None
    # the comparison and the multiplier of `npu_rec.ops.random.dropout_scale`
    largest_dropped, scale = round(request.dropout * 2**31) - 1, 1.0 / (1.0 - request.dropout)
    return (
        request.x,
        request.gate,
        request.weight,
        request.bias,
        keys,
        request.eps,
        largest_dropped,
        scale,
        instruction_set(),
    )


def forward(request: NormGateRequest) -> Tensor:
    """`[T, C]`."""
    out: Tensor = extension().norm_gate_forward(*_arguments(request))
    return out


def backward(request: NormGateRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate, weight, bias."""
    dx, d_gate, d_weight, d_bias = extension().norm_gate_backward(grad, *_arguments(request))
    return dx, d_gate, None if request.weight is None else d_weight, None if request.bias is None else d_bias


BACKEND = Backend("cpp", forward, backward, supports)
