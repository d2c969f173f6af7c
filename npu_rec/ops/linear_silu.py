"""Project, activate and split: `split(silu(x W^T + b))`, the start of an HSTU layer (arXiv 2402.17152, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_rec.ops import linear_silu_reference, linear_silu_vendor
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.linear_silu_reference import LinearSiluRequest, composed
from npu_rec.ops.registry import operator

LINEAR_SILU = operator(
    "linear_silu",
    linear_silu_vendor.BACKEND,
    linear_silu_reference.BACKEND,
    sample=LinearSiluRequest.sample,
)


def linear_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, splits: Sequence[int], backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`split(silu(x W^T + b))` in four parts.

    Unlike other operators the reference is not one call to PyTorch but PyTorch's own linear, silu and split: autocast
    and autograd see them, torch.compile fuses them (so `auto` stays with them while it compiles), and the parts are
    views. Under autocast the other backends compute in its dtype.

    Args:
        x: `[T, K]`, float64, float32, bfloat16 or float16.
        weight: `[N, K]`.
        bias: `[N]`, or None.
        splits: widths of the four parts; their sum is N.
        backend: `auto`, or the name of one.

    Returns:
        Four tensors `[T, split]`. Differentiable in x, weight, bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_tensors(floats={"x": x, "weight": weight, "bias": bias}, indices={}, optional=("bias",))
    check_constants(backend=(backend, str), **{f"splits[{i}]": (width, int) for i, width in enumerate(splits)})
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x must be [T, K] and weight [N, K], got {list(x.shape)}, {list(weight.shape)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x and weight must have one dtype, got {x.dtype}, {weight.dtype}")
    if len(splits) != 4 or min(splits) < 0 or sum(splits) != weight.shape[0]:
        raise ValueError(f"splits must be four widths that add up to N = {weight.shape[0]}, got {list(splits)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [N] = [{weight.shape[0]}], got {list(bias.shape)}")
    parts: Sequence[Tensor] | None = None
    if backend != "auto" or not torch.compiler.is_compiling():
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        request = LinearSiluRequest(x, weight, bias, tuple(splits), dtype)
        chosen = LINEAR_SILU.select(request, backend).name
        if chosen != "reference":
            parts = torch.ops.npu_rec.linear_silu(x.to(dtype), weight.to(dtype), bias, list(splits), chosen)[:4]
    u, v, q, k = composed(x, weight, bias, tuple(splits)) if parts is None else parts
    return u, v, q, k


@torch.library.custom_op("npu_rec::linear_silu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, splits: Sequence[int], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = LinearSiluRequest(x, weight, bias, tuple(splits), x.dtype)
    (u, v, q, k), product = LINEAR_SILU.forward(request, backend, x.device)
    return u, v, q, k, product


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, splits: Sequence[int], backend: str) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[0], width) for width in (*splits, weight.shape[0]))


@torch.library.custom_op("npu_rec::linear_silu_backward", mutates_args=())
def _backward(
    du: Tensor,
    dv: Tensor,
    dq: Tensor,
    dk: Tensor,
    product: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    splits: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    request = LinearSiluRequest(x, weight, bias, tuple(splits), x.dtype)
    dx, d_weight, d_bias = LINEAR_SILU.backward(request, backend, x.device, product, du, dv, dq, dk)
    # an operator's schema has no optional results: an absent bias has a gradient of no elements
    return dx, d_weight, x.new_empty(0) if d_bias is None else d_bias


@_backward.register_fake
def _(
    du: Tensor, dv: Tensor, dq: Tensor, dk: Tensor, product: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    *rest: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    bias_grad = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias_grad


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(output[4], *inputs[:3])
    ctx.constants = inputs[3:]  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[4])


def _autograd(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved, constants = ctx.saved_tensors, ctx.constants  # type: ignore[attr-defined]
    parts = [grad.contiguous() for grad in grads[:4]]
    dx, d_weight, d_bias = torch.ops.npu_rec.linear_silu_backward(*parts, *saved, *constants)
    return dx, d_weight, None if saved[3] is None else d_bias, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
