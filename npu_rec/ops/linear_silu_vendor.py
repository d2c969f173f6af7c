"""`linear_silu` by RecSDK's `mxrec::distance_in_linear_silu` and `in_linear_silu_backward`: half precision alone.

(`mxrec::in_linear_silu` is the same under autograd, which operators called from inside one of ours do not pass.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from npu_rec.ops.linear_silu_reference import LinearSiluRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.vendor_support import REC_OPS, outside, vendor_operator

FORWARD = replace(
    vendor_operator(
        REC_OPS, "mxrec::distance_in_linear_silu", x="Tensor", weight="Tensor", bias="Tensor", attr_dict="List[int]"
    ),
    returns=("List[Tensor]",),  # earlier releases return four tensors, without the product
)
BACKWARD = vendor_operator(
    REC_OPS,
    "mxrec::in_linear_silu_backward",
    x="Tensor",
    weight="Tensor",
    bias="Optional[Tensor]",
    user_grad="Tensor",
    value_grad="Tensor",
    query_grad="Tensor",
    key_grad="Tensor",
    linear_output="Tensor",
    attr_dict="List[int]",
)

WIDEST = 8192


def supports(request: LinearSiluRequest) -> str | None:
    """float16 and bfloat16; widths that are multiples of 16."""
    reason = FORWARD.unusable(request.x) or BACKWARD.unusable(request.x)
    if reason is not None:
        return reason
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 and bfloat16, not in {request.dtype}"
    if len(request.splits) != 4:
        return f"has 4 parts, not {len(request.splits)}"
    width, out = request.x.shape[1], request.weight.shape[0]
    reason = outside("T", request.x.shape[0], 1, 2**31 - 1) or outside("K", width, 16, WIDEST, multiple=16)
    for split in request.splits:
        reason = reason or outside("a part", split, 16, WIDEST, multiple=16)
    return reason or (f"N = {out} is not a multiple of 4 K = {4 * width}" if out % (4 * width) else None)


def _arguments(request: LinearSiluRequest) -> dict[str, object]:
    bias = request.weight.new_zeros(request.weight.shape[0]) if request.bias is None else request.bias
    return {"x": request.x, "weight": request.weight, "bias": bias.float(), "attr_dict": list(request.splits)}


def forward(request: LinearSiluRequest) -> tuple[tuple[Tensor, ...], Tensor]:
    """The parts `[T, split]` and the product before SiLU, `[T, N]`."""
    *parts, product = FORWARD(**_arguments(request))
    return tuple(parts), product


def backward(request: LinearSiluRequest, product: Tensor, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias; the operator sums in float32."""
    user, value, query, key = (grad.to(request.dtype) for grad in grads)
    dx, d_weight, d_bias, *_ = BACKWARD(
        user_grad=user, value_grad=value, query_grad=query, key_grad=key, linear_output=product, **_arguments(request)
    )
    bias = None if request.bias is None else d_bias.to(request.bias.dtype)
    return dx.to(request.dtype), d_weight.to(request.dtype), bias


BACKEND = Backend("vendor", forward, backward, supports)
