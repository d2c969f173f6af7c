"""`norm_gate` by `mxrec::norm_multiply_dropout` (RecSDK) or `ops_rec::ln_mul` on Ascend; gradients by the reference.

Both multiply LayerNorm(x) * weight + bias by the gate. The first draws a dropout of its own, which is not ours, so it
is called without; its gradients are reachable through its own autograd alone. The second has a fixed eps of 1e-5
(RecSDK's sources; the package's own are not public) and no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import norm_gate_reference
from npu_rec.ops.norm_gate_request import NormGateRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.vendor_support import OPS_REC, REC_OPS, dtype_refused, outside, vendor_operator

NORM_MULTIPLY_DROPOUT = vendor_operator(
    REC_OPS,
    "mxrec::norm_multiply_dropout",
    x="Tensor",
    u="Tensor",
    weight="Tensor",
    bias="Tensor",
    eps="float",
    dropout_ratio="float",
)
LN_MUL = vendor_operator(OPS_REC, "ops_rec::ln_mul", x="Tensor", u="Tensor", gamma="Tensor", beta="Tensor")

DROPOUT_WIDTHS = (512, 1024)
LN_MUL_EPS = 1e-5
LN_MUL_WIDEST = 2048  # the widest it is tested with


def _dropout_refuses(request: NormGateRequest) -> str | None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    reason = NORM_MULTIPLY_DROPOUT.unusable(request.x)
    if reason is not None:
        return reason
    if request.x.shape[1] not in DROPOUT_WIDTHS:
        return f"rows are {request.x.shape[1]} wide; 512 or 1024"
    if not 1e-10 <= request.eps <= 1e-4:
        return f"eps is {request.eps}; 1e-10 to 1e-4"
    return outside("T", request.x.shape[0], 1, 10**6) or dtype_refused(dtypes, request.x, request.gate)


def _ln_mul_refuses(request: NormGateRequest) -> str | None:
    reason = LN_MUL.unusable(request.x)
    if reason is not None:
        return reason
    if request.eps != LN_MUL_EPS:
        return f"eps is {request.eps}; it has {LN_MUL_EPS}"
    reason = outside("T", request.x.shape[0], 1, 2**31 - 1) or outside("C", request.x.shape[1], 1, LN_MUL_WIDEST)
    return reason or dtype_refused((torch.float32,), request.x, request.gate, request.weight, request.bias)


def supports(request: NormGateRequest) -> str | None:
    """The reason names both operators, those that are there."""
    if not NORM_MULTIPLY_DROPOUT.registered and not LN_MUL.registered:
        return f"{NORM_MULTIPLY_DROPOUT.unusable()}; {LN_MUL.unusable()}"
    if request.dropout > 0.0 and request.dropout_keys is not None:
        return "its dropout is not drawn from keys"
    first = _dropout_refuses(request)
    second = None if first is None else _ln_mul_refuses(request)
    return None if first is None or second is None else f"norm_multiply_dropout: {first}; ln_mul: {second}"


def forward(request: NormGateRequest) -> Tensor:
    """`[T, C]`."""
    x, gate = request.x, request.gate
    weight = x.new_ones(x.shape[1]) if request.weight is None else request.weight.to(x.dtype)
    bias = x.new_zeros(x.shape[1]) if request.bias is None else request.bias.to(x.dtype)
    x, gate = x.contiguous(), gate.contiguous()  # the kernels read rows one after the other
    out: Tensor
    if _dropout_refuses(request) is None:
        out = NORM_MULTIPLY_DROPOUT(x=x, u=gate, weight=weight, bias=bias, eps=request.eps, dropout_ratio=0.0)[0]
    else:
        out = LN_MUL(x=x, u=gate, gamma=weight.contiguous(), beta=bias.contiguous())
    return out


BACKEND = Backend("vendor", forward, norm_gate_reference.backward, supports)
