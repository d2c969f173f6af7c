"""Rotary position embedding: pairs of channels turned by an angle (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import rotary_cpp, rotary_reference, rotary_vendor
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.registry import operator
from npu_rec.ops.rotary_reference import RotaryRequest

ROTARY = operator(
    "rotary",
    rotary_cpp.BACKEND,
    rotary_vendor.BACKEND,
    rotary_reference.BACKEND,
    sample=RotaryRequest.sample,
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto") -> Tensor:
    """`x * cos + turned(x) * sin`, computed in float32 at least.

    Args:
        x: `[T, H, D]`, float64, float32, bfloat16 or float16; D even.
        cos, sin: `[T, D]`, the same for all heads; constants, without a gradient.
        interleaved: a pair is channels 2i and 2i + 1, turned(x)[2i] = -x[2i + 1] and turned(x)[2i + 1] = x[2i];
            otherwise i and i + D/2 (as in Llama).
        backend: `auto`, or the name of one.

    Returns:
        `[T, H, D]`, dtype of x. Differentiable in x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_tensors(floats={"x": x, "cos": cos, "sin": sin}, indices={})
    check_constants(interleaved=(interleaved, bool), backend=(backend, str))
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"x must be [T, H, D] with an even D, got {list(x.shape)}")
    if not cos.shape == sin.shape == (x.shape[0], x.shape[2]):
        raise ValueError(
            f"cos and sin must be [T, D] = {[x.shape[0], x.shape[2]]}, got {list(cos.shape)}, {list(sin.shape)}"
        )
    return torch.ops.npu_rec.rotary(x, cos, sin, interleaved, backend)  # type: ignore[no-any-return]


@torch.library.custom_op("npu_rec::rotary", mutates_args=())
def _forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> Tensor:
    return ROTARY.forward(RotaryRequest(x, cos, sin, interleaved), backend, x.device)  # type: ignore[no-any-return]


@_forward.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("npu_rec::rotary_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> Tensor:
    request = RotaryRequest(x, cos, sin, interleaved)
    return ROTARY.backward(request, backend, x.device, grad)[0]  # type: ignore[no-any-return]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(*inputs[:3])
    ctx.constants = inputs[3:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.npu_rec.rotary_backward(grad, *saved, *ctx.constants), None, None, None, None  # type: ignore[attr-defined]


_forward.register_autograd(_autograd, setup_context=_setup_context)
