"""Attention of both kinds in C++ for the CPU (kernels/cpu): what the kernels are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_rec.ops.attention_request import AttentionRequest
from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.masks import token_ids
from npu_rec.ops.time_buckets import bucket_edges


def supports(request: AttentionRequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU; products are accumulated in float32."""
    return unusable(request.q, request.position_weight, request.time_weight)


def arguments(
    kind: str,
    request: AttentionRequest,
    *,
    divisor: float = 1.0,
    query_offsets: Tensor | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
) -> Any:
    """`AttentionArguments` of kernels/cpu/ops.h, for attention of the kind `hstu` or `softmax`."""
    rule = request.rule
    ids = limits = None
    if request.num_targets is not None or rule.contextual_seq_len > 0:
        ids, limits = token_ids(request.offsets, request.k.shape[0], rule.contextual_seq_len, request.num_targets)
    buckets = 1 if request.time_weight is None else request.time_weight.shape[0] - 1
    return extension().AttentionArguments(
        kind,
        request.q,
        request.k,
        request.v,
        request.offsets,
        query_offsets,
        ids,
        limits,
        request.position_weight,
        request.time_weight,
        request.query_time,
        request.key_time,
        torch.tensor(bucket_edges(buckets)),
        request.max_seq_len,
        request.alpha,
        divisor,
        rule.causal,
        rule.contextual_seq_len,
        rule.max_attn_len,
        rule.min_full_attn_seq_len,
        dropout_keys if dropout > 0.0 else None,
        # the comparison and the multiplier of `npu_rec.ops.random.dropout_scale`
        min(round(dropout * 2**31), 2**31 - 1) - 1,
        1.0 / (1.0 - dropout),
        instruction_set(),
    )


def forward(given: Any) -> Tensor:
    """`[Tq, H, Dv]` for the `arguments`."""
    out: Tensor = extension().attention_forward(given)
    return out


def backward(given: Any, request: AttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    dq, dk, dv, d_position, d_time = extension().attention_backward(given, grad)
    return (
        dq,
        dk,
        dv,
        None if request.position_weight is None else d_position,
        None if request.time_weight is None else d_time,
    )
