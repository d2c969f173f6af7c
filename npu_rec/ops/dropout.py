"""Dropout of packed tokens, drawn by counter: what a token loses depends on its key alone."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import dropout_cpp, dropout_reference
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.dropout_reference import DropoutRequest
from npu_rec.ops.registry import operator

DROPOUT = operator(
    "dropout",
    dropout_cpp.BACKEND,
    dropout_reference.BACKEND,
    sample=DropoutRequest.sample,
)


def dropout(x: Tensor, probability: float, keys: Tensor | None, *, backend: str = "auto") -> Tensor:
    """`x` times 0 with `probability`, times `1 / (1 - probability)` otherwise; the bits are those of the reference.

    Args:
        x: `[T, C]`, float64, float32, bfloat16 or float16.
        probability: in [0, 1).
        keys: `[T]` int64; the same key drops the same channels. None: no dropout.
        backend: `auto`, or the name of one.

    Returns:
        `[T, C]`, dtype of x; without keys, or with probability 0, x itself. Differentiable in x; the backward pass
        draws again.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the probability is out of its range.
    """
    check_tensors(floats={"x": x}, indices={"keys": keys}, optional=("keys",))
    check_constants(probability=(probability, float), backend=(backend, str))
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"probability must be in [0, 1), got {probability}")
    if x.dim() != 2 or (keys is not None and keys.shape != x.shape[:1]):
        raise ValueError(
            f"x must be [T, C] and keys [T], got {list(x.shape)}, {None if keys is None else list(keys.shape)}"
        )
    if keys is None or probability == 0.0:
        return x
    return torch.ops.npu_rec.dropout(x, keys, probability, backend)  # type: ignore[no-any-return]


@torch.library.custom_op("npu_rec::dropout", mutates_args=())
def _forward(x: Tensor, keys: Tensor, probability: float, backend: str) -> Tensor:
    return DROPOUT.forward(DropoutRequest(x, keys, probability), backend, x.device)  # type: ignore[no-any-return]


@_forward.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("npu_rec::dropout_backward", mutates_args=())
def _backward(grad: Tensor, keys: Tensor, probability: float, backend: str) -> Tensor:
    # of x nothing is needed but its dtype and shape, which are those of the gradient
    request = DropoutRequest(grad, keys, probability)
    return DROPOUT.backward(request, backend, grad.device, grad)[0]  # type: ignore[no-any-return]


@_backward.register_fake
def _(grad: Tensor, *rest: object) -> Tensor:
    return grad.new_empty(grad.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(inputs[1])
    ctx.constants = inputs[2:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    (keys,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.npu_rec.dropout_backward(grad, keys, *ctx.constants), None, None, None  # type: ignore[attr-defined]


_forward.register_autograd(_autograd, setup_context=_setup_context)
