"""`rms_norm` by `torch_npu.npu_rms_norm`. Its backward pass runs the forward again, for 1 / rms as it wants it."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend
from npu_rec.ops.rms_norm_reference import RMSNormRequest
from npu_rec.ops.vendor_support import TORCH_NPU, dtype_refused, outside, vendor_operator

# releases call the first argument `self` or `input`
FORWARD = vendor_operator(TORCH_NPU, "npu::npu_rms_norm", "Tensor", gamma="Tensor", epsilon="float")
BACKWARD = vendor_operator(TORCH_NPU, "npu::npu_rms_norm_backward", "Tensor", "Tensor", gamma="Tensor", rstd="Tensor")


def supports(request: RMSNormRequest) -> str | None:
    """float32, float16 and bfloat16, the weight of the same dtype or float32; no empty tensors."""
    reason = FORWARD.unusable(request.x) or BACKWARD.unusable(request.x)
    reason = reason or dtype_refused((torch.float32, torch.float16, torch.bfloat16), request.x)
    reason = reason or dtype_refused((torch.float32, request.x.dtype), request.weight)
    return reason or outside("T", request.x.shape[0], 1, 2**31 - 1) or outside("C", request.x.shape[1], 1, 2**31 - 1)


def forward(request: RMSNormRequest) -> Tensor:
    """`[T, C]`."""
    out: Tensor = FORWARD(request.x, gamma=request.weight, epsilon=request.eps)[0]
    return out


def backward(request: RMSNormRequest, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    _, rstd = FORWARD(request.x, gamma=request.weight, epsilon=request.eps)
    dx, d_weight = BACKWARD(grad.to(request.x.dtype), request.x, gamma=request.weight, rstd=rstd)
    return dx, d_weight.to(request.weight.dtype)


BACKEND = Backend("vendor", forward, backward, supports)
