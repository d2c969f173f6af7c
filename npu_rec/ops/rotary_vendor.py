"""`rotary` by `torch_npu.npu_rotary_mul`, in its layout TND; cos and sin are converted to the dtype of x."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend
from npu_rec.ops.rotary_reference import RotaryRequest
from npu_rec.ops.vendor_support import TORCH_NPU, dtype_refused, outside, vendor_operator

# releases call the first argument `self` or `input`
FORWARD = vendor_operator(TORCH_NPU, "npu::npu_rotary_mul", "Tensor", r1="Tensor", r2="Tensor", rotary_mode="str")
BACKWARD = vendor_operator(
    TORCH_NPU, "npu::npu_rotary_mul_backward", "Tensor", "Tensor", r1="Tensor", r2="Tensor", rotary_mode="str"
)


def supports(request: RotaryRequest) -> str | None:
    """float32, float16 and bfloat16, fewer than 1000 heads, each narrower than 896."""
    reason = FORWARD.unusable(request.x) or BACKWARD.unusable(request.x)
    reason = reason or dtype_refused((torch.float32, torch.float16, torch.bfloat16), request.x)
    reason = reason or outside("T", request.x.shape[0], 1, 2**31 - 1)
    reason = reason or outside("the number of heads", request.x.shape[1], 1, 999)
    return reason or outside("the head width", request.x.shape[2], 2, 894, multiple=2)


def _factors(request: RotaryRequest) -> dict[str, object]:
    cos, sin = (factor.to(request.x.dtype).unsqueeze(1).contiguous() for factor in (request.cos, request.sin))
    return {"r1": cos, "r2": sin, "rotary_mode": "interleave" if request.interleaved else "half"}


def forward(request: RotaryRequest) -> Tensor:
    """`[T, H, D]`."""
    out: Tensor = FORWARD(request.x.contiguous(), **_factors(request))
    return out


def backward(request: RotaryRequest, grad: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    grad = grad.to(request.x.dtype).contiguous()
    return (BACKWARD(grad, request.x.contiguous(), **_factors(request))[0],)


BACKEND = Backend("vendor", forward, backward, supports)
