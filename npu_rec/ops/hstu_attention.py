"""HSTU attention over jagged sequences: `silu(alpha q k^T + bias) / divisor * mask @ v`.

HSTU, arXiv 2402.17152, section 3. The relative bias is an argument of the operator, so a
backend can compute it tile by tile, forward and backward, without an [N, N] tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_rec.ops import (
    hstu_attention_cpp,
    hstu_attention_reference,
    hstu_attention_tiled,
    hstu_attention_triton,
    hstu_attention_triton_ascend,
    hstu_attention_vendor,
)
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest, check_shapes
from npu_rec.ops.masks import MaskRule
from npu_rec.ops.registry import operator
from npu_rec.ops.relative_bias import RelativeBias

HSTU_ATTENTION = operator(
    "hstu_attention",
    hstu_attention_cpp.BACKEND,
    hstu_attention_triton.BACKEND,
    hstu_attention_vendor.BACKEND,
    hstu_attention_triton_ascend.BACKEND,
    hstu_attention_tiled.BACKEND,
    hstu_attention_reference.BACKEND,
    sample=HSTUAttentionRequest.sample,
)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_seq_len: int,
    alpha: float = 1.0,
    divisor: float | None = None,
    causal: bool = True,
    num_targets: Tensor | None = None,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    bias: RelativeBias | None = None,
    query_offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """HSTU attention, differentiable in q, k, v and the two weights of the bias.

    Args:
        q, k: `[T, H, Dqk]` (with query_offsets q is `[Tq, H, Dqk]`), float64, float32, bfloat16 or float16.
        v: `[T, H, Dv]`, same dtype. H, Dqk and Dv are 1 or more; a backend may have a limit.
        offsets: `[B + 1]` int64; no sequence longer than `max_seq_len`.
        max_seq_len: N, the model's constant (not the batch's maximum): default divisor, origin of the position table.
        alpha: factor on q k^T, applied before the bias is added.
        divisor: attention is divided by it, a positive number; N by default.
        causal: whether a token sees earlier tokens only.
        num_targets: `[B]` int64, trailing candidates; each sees the history and itself.
        contextual_seq_len: leading tokens that see the whole history.
        max_attn_len: local window in ids, 0 for none.
        min_full_attn_seq_len: the last so many history tokens (and targets) ignore the window.
        bias: relative position and time bias, or None.
        query_offsets: `[B + 1]` int64, or None: every token is a query. Otherwise q holds the last tokens of each
            sequence alone, and query_time of the bias is `[Tq]`; places and masks stay those of the whole sequence.
        backend: `auto`, or the name of one.

    Returns:
        `[T, H, Dv]` (with query_offsets `[Tq, H, Dv]`), dtype of v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or (on the CPU) offsets do not describe the tokens.
        BackendError: the named backend cannot run this request.
    """
    if bias is not None and not isinstance(bias, RelativeBias):
        raise TypeError(f"bias must be a RelativeBias or None, got {type(bias).__name__}")
    position_weight, time_weight, query_time, key_time = (
        (None,) * 4 if bias is None else (bias.position_weight, bias.time_weight, bias.query_time, bias.key_time)
    )
    check_tensors(
        floats={"q": q, "k": k, "v": v, "position_weight": position_weight, "time_weight": time_weight},
        indices={
            "offsets": offsets,
            "query_offsets": query_offsets,
            "num_targets": num_targets,
            "query_time": query_time,
            "key_time": key_time,
        },
        optional=(
            "query_offsets",
            "num_targets",
            "time_weight",
            "query_time",
            "key_time",
            *(("position_weight",) if bias is None else ()),
        ),
    )
    divisor = max_seq_len if divisor is None else divisor
    check_constants(
        max_seq_len=(max_seq_len, int),
        alpha=(alpha, float),
        divisor=(divisor, float),
        causal=(causal, bool),
        contextual_seq_len=(contextual_seq_len, int),
        max_attn_len=(max_attn_len, int),
        min_full_attn_seq_len=(min_full_attn_seq_len, int),
        backend=(backend, str),
    )
    check_shapes(q, k, v, offsets, query_offsets, num_targets)
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len must be 1 or more, got {max_seq_len}")
    if not 0.0 < divisor < math.inf:
        raise ValueError(f"divisor must be positive and finite, got {divisor}")
    if not -math.inf < alpha < math.inf:
        raise ValueError(f"alpha must be finite, got {alpha}")
    MaskRule(causal, contextual_seq_len, max_attn_len, min_full_attn_seq_len)
    if bias is not None:
        bias.check(k.shape[0], max_seq_len, q.shape[0])
    out: Tensor = torch.ops.npu_rec.hstu_attention(
        q,
        k,
        v,
        offsets,
        num_targets,
        position_weight,
        time_weight,
        query_time,
        key_time,
        max_seq_len,
        alpha,
        float(divisor),
        causal,
        contextual_seq_len,
        max_attn_len,
        min_full_attn_seq_len,
        backend,
        query_offsets,
    )
    return out


@torch.library.custom_op("npu_rec::hstu_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    query_time: Tensor | None,
    key_time: Tensor | None,
    max_seq_len: int,
    alpha: float,
    divisor: float,
    causal: bool,
    contextual_seq_len: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    backend: str,
    query_offsets: Tensor | None = None,
) -> Tensor:
    rule = MaskRule(causal, contextual_seq_len, max_attn_len, min_full_attn_seq_len)
    request = HSTUAttentionRequest(
        q, k, v, offsets, num_targets, position_weight, time_weight, query_time, key_time,
        max_seq_len, alpha, divisor, rule, query_offsets,
    )  # fmt: skip
    request.check()
    out: Tensor = HSTU_ATTENTION.forward(request, backend, q.device)
    return out


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty((q.shape[0], *v.shape[1:]))


@torch.library.custom_op("npu_rec::hstu_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    query_time: Tensor | None,
    key_time: Tensor | None,
    max_seq_len: int,
    alpha: float,
    divisor: float,
    causal: bool,
    contextual_seq_len: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    backend: str,
    query_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rule = MaskRule(causal, contextual_seq_len, max_attn_len, min_full_attn_seq_len)
    request = HSTUAttentionRequest(
        q, k, v, offsets, num_targets, position_weight, time_weight, query_time, key_time,
        max_seq_len, alpha, divisor, rule, query_offsets,
    )  # fmt: skip
    dq, dk, dv, d_position, d_time = HSTU_ATTENTION.backward(request, backend, q.device, grad)
    # an operator's schema has no optional results: an absent weight has a gradient of no elements
    return (
        dq,
        dk,
        dv,
        q.new_empty(0) if d_position is None else d_position,
        q.new_empty(0) if d_time is None else d_time,
    )


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, num_targets: Tensor | None,
    position_weight: Tensor | None, time_weight: Tensor | None, *rest: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (position_weight, time_weight))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *weights


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9], inputs[-1])  # type: ignore[arg-type]
    ctx.constants = inputs[9:-1]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *saved, query_offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    constants = ctx.constants  # type: ignore[attr-defined]
    dq, dk, dv, d_position, d_time = torch.ops.npu_rec.hstu_attention_backward(grad, *saved, *constants, query_offsets)
    weights = (d_position if saved[5] is not None else None, d_time if saved[6] is not None else None)
    return dq, dk, dv, None, None, *weights, *(None,) * (len(constants) + 3)


_forward.register_autograd(_autograd, setup_context=_setup_context)
