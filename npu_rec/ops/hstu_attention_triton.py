"""`hstu_attention` in Triton (kernels/triton): the bias, and its gradients, inside the kernel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.time_buckets import bucket_edges
from npu_rec.ops.triton_support import INTERPRETED, unusable

if TYPE_CHECKING:
    from npu_rec.kernels.triton.attention_call import Attention

FARTHEST = 2**30 - 1  # seconds from the middle of a batch's times, so that differences fit int32


def supports(request: HSTUAttentionRequest) -> str | None:
    """float32, bfloat16 and float16, heads up to 256 wide; products are accumulated in float32.

    Times of a batch may span 68 years; those farther from the middle count as 34 years from it.
    """
    if request.query_offsets is not None:
        return "takes as many queries as keys, no query_offsets"
    widest = max(request.q.shape[2], request.v.shape[2])
    if widest > 256:
        return f"a head is {widest} wide; up to 256"
    return unusable(request.q, request.position_weight, request.time_weight)


@cache
def _edges(buckets: int, device: torch.device) -> Tensor:
    return torch.tensor(bucket_edges(buckets)).clamp_max(2**31 - 1).to(device, torch.int32)


def unit_stride(x: Tensor) -> Tensor:
    """`x` with a stride of 1 in its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def call_of(request: HSTUAttentionRequest) -> Attention:
    """The request with its times rebased to int32 seconds and its tensors laid out for the kernels."""
    from npu_rec.kernels.triton.attention_call import Attention

    rule, position, time = request.rule, request.position_weight, request.time_weight
    query_seconds = key_seconds = None
    if time is not None and request.q.shape[0]:
        assert request.query_time is not None
        assert request.key_time is not None
        least, most = torch.stack([request.query_time, request.key_time]).aminmax()
        middle = least + (most - least) // 2
        query_seconds = (request.query_time - middle).clamp(-FARTHEST, FARTHEST).to(torch.int32)
        key_seconds = (request.key_time - middle).clamp(-FARTHEST, FARTHEST).to(torch.int32)
    return Attention(
        unit_stride(request.q),
        unit_stride(request.k),
        unit_stride(request.v),
        request.offsets.contiguous(),
        None if request.num_targets is None else request.num_targets.contiguous(),
        None if position is None else position.float().contiguous(),
        None if time is None else time.float().contiguous(),
        query_seconds,
        key_seconds,
        _edges(1 if time is None else time.shape[0] - 1, request.q.device),
        request.max_seq_len,
        request.alpha,
        request.divisor,
        rule.causal,
        rule.contextual_seq_len,
        rule.max_attn_len,
        rule.min_full_attn_seq_len,
    )


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    from npu_rec.kernels.triton import attention

    return attention.forward(call_of(request))


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    from npu_rec.kernels.triton import attention

    return in_their_dtypes(request, *attention.backward(call_of(request), unit_stride(grad)))


def in_their_dtypes(
    request: HSTUAttentionRequest, dq: Tensor, dk: Tensor, dv: Tensor, d_position: Tensor | None, d_time: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients, those of the tables in the dtype of their table."""
    position, time = request.position_weight, request.time_weight
    return (
        dq,
        dk,
        dv,
        None if position is None or d_position is None else d_position.to(position.dtype),
        None if time is None or d_time is None else d_time.to(time.dtype),
    )


BACKEND = Backend("triton", forward, backward, supports, by_name_only=INTERPRETED)
