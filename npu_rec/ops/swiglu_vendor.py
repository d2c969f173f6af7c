"""`swiglu` by `torch_npu.npu_swiglu`."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend
from npu_rec.ops.swiglu_reference import SwiGLURequest
from npu_rec.ops.vendor_support import TORCH_NPU, dtype_refused, vendor_operator

# releases call the argument `self` or `input`
FORWARD = vendor_operator(TORCH_NPU, "npu::npu_swiglu", "Tensor", dim="int")
BACKWARD = vendor_operator(TORCH_NPU, "npu::npu_swiglu_backward", "Tensor", "Tensor", dim="int")


def supports(request: SwiGLURequest) -> str | None:
    """float32, float16 and bfloat16; no empty tensors."""
    reason = FORWARD.unusable(request.x) or BACKWARD.unusable(request.x)
    reason = reason or dtype_refused((torch.float32, torch.float16, torch.bfloat16), request.x)
    return reason or ("the tensor is empty" if request.x.numel() == 0 else None)


def forward(request: SwiGLURequest) -> Tensor:
    """`[T, C]`."""
    out: Tensor = FORWARD(request.x.contiguous(), dim=-1)
    return out


def backward(request: SwiGLURequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    return (BACKWARD(grad.to(request.x.dtype).contiguous(), request.x.contiguous(), dim=-1),)


BACKEND = Backend("vendor", forward, backward, supports)
