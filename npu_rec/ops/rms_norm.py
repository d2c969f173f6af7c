"""RMSNorm: `x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_rec.ops import rms_norm_cpp, rms_norm_reference, rms_norm_vendor
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.registry import operator
from npu_rec.ops.rms_norm_reference import RMSNormRequest

RMS_NORM = operator(
    "rms_norm",
    rms_norm_cpp.BACKEND,
    rms_norm_vendor.BACKEND,
    rms_norm_reference.BACKEND,
    sample=RMSNormRequest.sample,
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32 at least.

    Args:
        x: `[T, C]`, float64, float32, bfloat16 or float16; the mean is over C.
        weight: `[C]`.
        eps: added to the mean, 0 or more.
        backend: `auto`, or the name of one.

    Returns:
        `[T, C]`, dtype of x. Differentiable in x and weight.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or eps is out of its range.
    """
    check_tensors(floats={"x": x, "weight": weight}, indices={})
    check_constants(eps=(eps, float), backend=(backend, str))
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number, 0 or more, got {eps}")
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x must be [T, C] and weight [C], got {list(x.shape)}, {list(weight.shape)}")
    return torch.ops.npu_rec.rms_norm(x, weight, eps, backend)  # type: ignore[no-any-return]


@torch.library.custom_op("npu_rec::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return RMS_NORM.forward(RMSNormRequest(x, weight, eps), backend, x.device)  # type: ignore[no-any-return]


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("npu_rec::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return RMS_NORM.backward(RMSNormRequest(x, weight, eps), backend, x.device, grad)  # type: ignore[no-any-return]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(*inputs[:2])
    ctx.constants = inputs[2:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, d_weight = torch.ops.npu_rec.rms_norm_backward(grad, x, weight, *ctx.constants)  # type: ignore[attr-defined]
    return dx, d_weight, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
