"""Normalise and gate: `dropout(LayerNorm(x) * gate)`, the end of an HSTU layer (arXiv 2402.17152, equation 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_rec.ops import (
    norm_gate_cpp,
    norm_gate_reference,
    norm_gate_triton,
    norm_gate_triton_ascend,
    norm_gate_vendor,
)
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.norm_gate_request import NormGateRequest
from npu_rec.ops.registry import operator

NORM_GATE = operator(
    "norm_gate",
    norm_gate_cpp.BACKEND,
    norm_gate_triton.BACKEND,
    norm_gate_vendor.BACKEND,
    norm_gate_triton_ascend.BACKEND,
    norm_gate_reference.BACKEND,
    sample=NormGateRequest.sample,
)


def norm_gate(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`dropout(LayerNorm(x) * gate)`.

    Args:
        x, gate: `[T, C]`, float64, float32, bfloat16 or float16; LayerNorm over C.
        weight, bias: `[C]` of the LayerNorm, or None.
        eps: of the LayerNorm, 0 or more.
        dropout: probability, used when `dropout_keys` are given.
        dropout_keys: `[T]` int64; the same key drops the same channels. None: no dropout.
        backend: `auto`, or the name of one.

    Returns:
        `[T, C]`, dtype of x. Differentiable in x, gate, weight, bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a number is out of its range.
    """
    check_tensors(
        floats={"x": x, "gate": gate, "weight": weight, "bias": bias},
        indices={"dropout_keys": dropout_keys},
        optional=("weight", "bias", "dropout_keys"),
    )
    check_constants(eps=(eps, float), dropout=(dropout, float), backend=(backend, str))
    if x.dim() != 2 or gate.shape != x.shape:
        raise ValueError(f"x and gate must be [T, C], got {list(x.shape)}, {list(gate.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[1:]:
            raise ValueError(f"{name} must be [C] = [{x.shape[1]}], got {list(parameter.shape)}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number, 0 or more, got {eps}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout_keys is not None and dropout_keys.shape != x.shape[:1]:
        raise ValueError(f"dropout_keys must be [T] = [{x.shape[0]}], got {list(dropout_keys.shape)}")
    return torch.ops.npu_rec.norm_gate(  # type: ignore[no-any-return]
        x, gate.to(x.dtype), weight, bias, dropout_keys, eps, dropout, backend
    )


@torch.library.custom_op("npu_rec::norm_gate", mutates_args=())
def _forward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_keys: Tensor | None,
    eps: float,
    dropout: float,
    backend: str,
) -> Tensor:
    request = NormGateRequest(x, gate, weight, bias, dropout_keys, eps, dropout)
    return NORM_GATE.forward(request, backend, x.device)  # type: ignore[no-any-return]


@_forward.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("npu_rec::norm_gate_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_keys: Tensor | None,
    eps: float,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    request = NormGateRequest(x, gate, weight, bias, dropout_keys, eps, dropout)
    dx, d_gate, d_weight, d_bias = NORM_GATE.backward(request, backend, x.device, grad)
    # an operator's schema has no optional results: an absent parameter has a gradient of no elements
    return dx, d_gate, x.new_empty(0) if d_weight is None else d_weight, x.new_empty(0) if d_bias is None else d_bias


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: object
) -> tuple[Tensor, ...]:
    parameters = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return x.new_empty(x.shape), gate.new_empty(gate.shape), *parameters


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(*inputs[:5])
    ctx.constants = inputs[5:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, d_gate, d_weight, d_bias = torch.ops.npu_rec.norm_gate_backward(
        grad,
        *saved,
        *ctx.constants,  # type: ignore[attr-defined]
    )
    parameters = (d_weight if saved[2] is not None else None, d_bias if saved[3] is not None else None)
    return dx, d_gate, *parameters, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
