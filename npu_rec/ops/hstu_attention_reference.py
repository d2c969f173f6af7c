"""`hstu_attention`, obviously right: padded, every score and bias materialised, backward by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import jagged_to_padded, offsets_to_lengths, padded_to_jagged
from npu_rec.ops.masks import allowed, token_ids
from npu_rec.ops.registry import Backend, backward_by_autograd
from npu_rec.ops.time_buckets import time_bucket_reference


def attention(
    request: HSTUAttentionRequest,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    *,
    pad_to: int | None = None,
) -> Tensor:
    """The operator for given q, k, v and weights, everything else from `request`; `[T, H, Dv]`.

    `pad_to` is the padded length; the longest sequence of the batch by default.
    """
    if q.shape[0] == 0:
        return v[:0] * 1.0
    tokens, query_time = None, request.query_time
    if request.query_offsets is not None:  # attention of all tokens, of which those that are no query are dropped
        tokens = request.tokens_of_queries
        q = torch.zeros_like(k).index_put((tokens,), q)
        query_time = None if query_time is None else _at(tokens, query_time, k.shape[0])
    offsets, dtype = request.offsets, request.compute_dtype
    length = int(offsets_to_lengths(offsets).max()) if pad_to is None else pad_to

    def pad(x: Tensor) -> Tensor:
        return jagged_to_padded(x, offsets, length)

    ids, limits = (pad(x) for x in token_ids(offsets, k.shape[0], request.rule.contextual_seq_len, request.num_targets))
    query_id, key_id = ids[:, :, None], ids[:, None, :]
    same = torch.eye(length, dtype=torch.bool, device=q.device)
    mask = allowed(request.rule, query_id, key_id, same, limits[:, :, None])
    present = torch.arange(length, device=q.device) < offsets_to_lengths(offsets)[:, None]
    mask = mask & present[:, None, :] & present[:, :, None]

    scores = torch.einsum("bihd,bjhd->bhij", pad(q).to(dtype), pad(k).to(dtype)) * request.alpha
    if position_weight is not None:
        distance = torch.where(mask, key_id - query_id, 0)
        scores = scores + position_weight.to(dtype)[request.max_seq_len - 1 + distance].unsqueeze(1)
    if time_weight is not None:
        assert query_time is not None
        assert request.key_time is not None
        delta = pad(query_time)[:, :, None] - pad(request.key_time)[:, None, :]
        buckets = time_bucket_reference(delta, time_weight.shape[0] - 1)
        scores = scores + time_weight.to(dtype)[buckets].unsqueeze(1)
    attended = silu(scores) / request.divisor * mask.unsqueeze(1)
    out = torch.einsum("bhij,bjhd->bihd", attended, pad(v).to(dtype))
    packed = padded_to_jagged(out, offsets).to(v.dtype)
    return packed if tokens is None else packed[tokens]


def _at(places: Tensor, values: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_put((places,), values)


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    return attention(request, request.q, request.k, request.v, request.position_weight, request.time_weight)


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    inputs = (request.q, request.k, request.v, request.position_weight, request.time_weight)
    return backward_by_autograd(lambda *leaves: attention(request, *leaves), grad, inputs)


BACKEND = Backend("reference", forward, backward)
