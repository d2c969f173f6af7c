"""SwiGLU: `silu(a) * b` of the two halves of a projection (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import swiglu_cpp, swiglu_reference, swiglu_vendor
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.registry import operator
from npu_rec.ops.swiglu_reference import SwiGLURequest

SWIGLU = operator(
    "swiglu",
    swiglu_cpp.BACKEND,
    swiglu_vendor.BACKEND,
    swiglu_reference.BACKEND,
    sample=SwiGLURequest.sample,
)


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """`silu(x[:, :C]) * x[:, C:]`, computed in float32 at least.

    Args:
        x: `[T, 2C]`, float64, float32, bfloat16 or float16.
        backend: `auto`, or the name of one.

    Returns:
        `[T, C]`, dtype of x. Differentiable in x.

    Raises:
        ValueError: the width is odd, x has not two dimensions, or another dtype.
    """
    check_tensors(floats={"x": x}, indices={})
    check_constants(backend=(backend, str))
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x must be [T, 2C], got {list(x.shape)}")
    return torch.ops.npu_rec.swiglu(x, backend)  # type: ignore[no-any-return]


@torch.library.custom_op("npu_rec::swiglu", mutates_args=())
def _forward(x: Tensor, backend: str) -> Tensor:
    return SWIGLU.forward(SwiGLURequest(x), backend, x.device)  # type: ignore[no-any-return]


@_forward.register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("npu_rec::swiglu_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return SWIGLU.backward(SwiGLURequest(x), backend, x.device, grad)[0]  # type: ignore[no-any-return]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(inputs[0])
    ctx.backend = inputs[1]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.npu_rec.swiglu_backward(grad, x, ctx.backend), None  # type: ignore[attr-defined]


_forward.register_autograd(_autograd, setup_context=_setup_context)
