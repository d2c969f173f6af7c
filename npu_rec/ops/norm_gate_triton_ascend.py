"""`norm_gate` in Triton for Ascend (kernels/ascend): nothing saved for the backward pass, dropout inside the kernel."""

from __future__ import annotations

from torch import Tensor

from npu_rec.ops.norm_gate_request import NormGateRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.triton_ascend_support import unusable, vector_cores
from npu_rec.ops.triton_support import INTERPRETED

WIDEST = 2048  # two rows lie whole in the memory of a vector core


def supports(request: NormGateRequest) -> str | None:
    """float32, bfloat16 and float16, up to a width; computes in float32."""
    width = request.x.shape[1]
    if not 1 <= width <= WIDEST:
        return f"rows are {width} wide; 1 to {WIDEST}"
    return unusable(request.x, request.gate, request.weight, request.bias)


def forward(request: NormGateRequest) -> Tensor:
    """`[T, C]`."""
    from npu_rec.kernels.ascend import norm_gate

    return norm_gate.forward(
        request.x,
        request.gate,
        request.weight,
        request.bias,
        request.dropout_keys,
        request.eps,
        request.dropout,
        vector_cores(request.x),
    )


def backward(request: NormGateRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate, weight, bias."""
    from npu_rec.kernels.ascend import norm_gate

    return norm_gate.backward(
        grad,
        request.x,
        request.gate,
        request.weight,
        request.bias,
        request.dropout_keys,
        request.eps,
        request.dropout,
        vector_cores(request.x),
    )


BACKEND = Backend("triton_ascend", forward, backward, supports, by_name_only=INTERPRETED)
