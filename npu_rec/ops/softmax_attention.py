"""Softmax attention over jagged sequences, for Transformer backbones: `dropout(softmax(scale q k^T + bias)) @ v`.

Masks and the relative bias are those of `hstu_attention`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_rec.ops import (
    softmax_attention_cpp,
    softmax_attention_flash,
    softmax_attention_reference,
    softmax_attention_tiled,
    softmax_attention_vendor,
)
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.masks import MaskRule
from npu_rec.ops.registry import operator
from npu_rec.ops.relative_bias import RelativeBias
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest

SOFTMAX_ATTENTION = operator(
    "softmax_attention",
    softmax_attention_cpp.BACKEND,
    softmax_attention_flash.BACKEND,
    softmax_attention_vendor.BACKEND,
    softmax_attention_tiled.BACKEND,
    softmax_attention_reference.BACKEND,
    sample=SoftmaxAttentionRequest.sample,
)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_seq_len: int,
    scale: float | None = None,
    causal: bool = True,
    num_targets: Tensor | None = None,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    bias: RelativeBias | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention, differentiable in q, k, v and the two weights of the bias.

    Args:
        q, k: `[T, H, D]`, float64, float32, bfloat16 or float16.
        v: `[T, H, Dv]`, same dtype. H, D and Dv are 1 or more.
        offsets: `[B + 1]` int64; no sequence longer than `max_seq_len`.
        max_seq_len: N, the model's constant: origin of the position table.
        scale: factor on q k^T, applied before the bias is added; 1 / sqrt(D) by default.
        causal, num_targets, contextual_seq_len, max_attn_len, min_full_attn_seq_len: the mask, as in `hstu_attention`.
        bias: relative position and time bias, or None.
        dropout: probability with which an attention weight is dropped, used when `dropout_keys` are given.
        dropout_keys: `[T]` int64 of the queries; a weight's draw depends on the key of its query, the head and the
            place of its key in the sequence. None: no dropout.
        backend: `auto`, or the name of one.

    Returns:
        `[T, H, Dv]`, dtype of v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or (on the CPU) offsets do not describe the tokens.
        BackendError: the named backend cannot run this request.
    """
    if bias is not None and not isinstance(bias, RelativeBias):
        raise TypeError(f"bias must be a RelativeBias or None, got {type(bias).__name__}")
    position_weight, time_weight, query_time, key_time = (
        (None,) * 4 if bias is None else (bias.position_weight, bias.time_weight, bias.query_time, bias.key_time)
    )
    indices = {
        "num_targets": num_targets,
        "query_time": query_time,
        "key_time": key_time,
        "dropout_keys": dropout_keys,
    }
    check_tensors(
        floats={"q": q, "k": k, "v": v, "position_weight": position_weight, "time_weight": time_weight},
        indices={"offsets": offsets, **indices},
        optional=("time_weight", *indices, *(("position_weight",) if bias is None else ())),
    )
    check_constants(
        max_seq_len=(max_seq_len, int),
        scale=(1.0 if scale is None else scale, float),
        causal=(causal, bool),
        contextual_seq_len=(contextual_seq_len, int),
        max_attn_len=(max_attn_len, int),
        min_full_attn_seq_len=(min_full_attn_seq_len, int),
        dropout=(dropout, float),
        backend=(backend, str),
    )
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"q, k, v must be [T, H, D], [T, H, D], [T, H, Dv]; got {[list(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[1] < 1 or q.shape[2] < 1 or v.shape[2] < 1:
        raise ValueError(f"heads and their widths must be 1 or more, got {[list(x.shape) for x in (q, k, v)]}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [B + 1], got {list(offsets.shape)}")
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len must be 1 or more, got {max_seq_len}")
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if num_targets is not None and num_targets.shape != (offsets.shape[0] - 1,):
        raise ValueError(f"num_targets must be [B] = [{offsets.shape[0] - 1}], got {list(num_targets.shape)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout_keys is not None and dropout_keys.shape != q.shape[:1]:
        raise ValueError(f"dropout_keys must be [T] = [{q.shape[0]}], got {list(dropout_keys.shape)}")
    MaskRule(causal, contextual_seq_len, max_attn_len, min_full_attn_seq_len)
    if bias is not None:
        bias.check(q.shape[0], max_seq_len)
    return torch.ops.npu_rec.softmax_attention(  # type: ignore[no-any-return]
        q,
        k,
        v,
        offsets,
        num_targets,
        position_weight,
        time_weight,
        query_time,
        key_time,
        dropout_keys,
        max_seq_len,
        scale,
        dropout,
        causal,
        contextual_seq_len,
        max_attn_len,
        min_full_attn_seq_len,
        backend,
    )


@torch.library.custom_op("npu_rec::softmax_attention", mutates_args=())
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
    dropout_keys: Tensor | None,
    max_seq_len: int,
    scale: float,
    dropout: float,
    causal: bool,
    contextual_seq_len: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    backend: str,
) -> Tensor:
    rule = MaskRule(causal, contextual_seq_len, max_attn_len, min_full_attn_seq_len)
    request = SoftmaxAttentionRequest(
        q, k, v, offsets, num_targets, position_weight, time_weight, query_time, key_time, dropout_keys,
        max_seq_len, scale, dropout, rule,
    )  # fmt: skip
    request.check()
    out: Tensor = SOFTMAX_ATTENTION.forward(request, backend, q.device)
    return out


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("npu_rec::softmax_attention_backward", mutates_args=())
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
    dropout_keys: Tensor | None,
    max_seq_len: int,
    scale: float,
    dropout: float,
    causal: bool,
    contextual_seq_len: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rule = MaskRule(causal, contextual_seq_len, max_attn_len, min_full_attn_seq_len)
    request = SoftmaxAttentionRequest(
        q, k, v, offsets, num_targets, position_weight, time_weight, query_time, key_time, dropout_keys,
        max_seq_len, scale, dropout, rule,
    )  # fmt: skip
    dq, dk, dv, d_position, d_time = SOFTMAX_ATTENTION.backward(request, backend, q.device, grad)
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
    ctx.save_for_backward(*inputs[:10])  # type: ignore[arg-type]
    ctx.constants = inputs[10:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    constants = ctx.constants  # type: ignore[attr-defined]
    dq, dk, dv, d_position, d_time = torch.ops.npu_rec.softmax_attention_backward(grad, *saved, *constants)
    weights = (d_position if saved[5] is not None else None, d_time if saved[6] is not None else None)
    return dq, dk, dv, None, None, *weights, *(None,) * (len(constants) + 3)


_forward.register_autograd(_autograd, setup_context=_setup_context)
