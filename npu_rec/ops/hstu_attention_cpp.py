"""`hstu_attention` in C++ for the CPU (kernels/cpu): tiles in the cache, the bias made where it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.masks import token_ids
from npu_rec.ops.registry import Backend
from npu_rec.ops.time_buckets import bucket_edges


def supports(request: HSTUAttentionRequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU; products are accumulated in float32."""
    return unusable(request.q, request.position_weight, request.time_weight)


def _arguments(request: HSTUAttentionRequest) -> tuple[Any, ...]:
    rule = request.rule
    ids = limits = None
    if request.num_targets is not None or rule.contextual_seq_len > 0:
        ids, limits = token_ids(request.offsets, request.k.shape[0], rule.contextual_seq_len, request.num_targets)
    buckets = 1 if request.time_weight is None else request.time_weight.shape[0] - 1
    return (
        request.q,
        request.k,
        request.v,
        request.offsets,
        request.query_offsets,
        ids,
        limits,
        request.position_weight,
        request.time_weight,
        request.query_time,
        request.key_time,
        torch.tensor(bucket_edges(buckets)),
        request.max_seq_len,
        request.alpha,
        request.divisor,
        rule.causal,
        rule.contextual_seq_len,
        rule.max_attn_len,
        rule.min_full_attn_seq_len,
        instruction_set(),
    )


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[Tq, H, Dv]`."""
    out: Tensor = extension().hstu_attention_forward(*_arguments(request))
    return out


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    dq, dk, dv, d_position, d_time = extension().hstu_attention_backward(grad, *_arguments(request))
    return (
        dq,
        dk,
        dv,
        None if request.position_weight is None else d_position,
        None if request.time_weight is None else d_time,
    )


BACKEND = Backend("cpp", forward, backward, supports)
