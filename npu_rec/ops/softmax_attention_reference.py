"""`softmax_attention`, obviously right: padded, every score and bias materialised, backward by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.jagged import jagged_to_padded, offsets_to_lengths, padded_to_jagged
from npu_rec.ops.masks import allowed, token_ids
from npu_rec.ops.random import derive_keys, dropout_scale
from npu_rec.ops.registry import Backend, backward_by_autograd
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest
from npu_rec.ops.time_buckets import time_bucket_reference


def attention(
    request: SoftmaxAttentionRequest,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
) -> Tensor:
    """The operator for given q, k, v and weights, everything else from `request`; `[T, H, Dv]`."""
    if q.shape[0] == 0:
        return v * 1.0
    offsets, dtype = request.offsets, request.compute_dtype
    lengths = offsets_to_lengths(offsets)
    longest = int(lengths.max())

    def pad(x: Tensor) -> Tensor:
        return jagged_to_padded(x, offsets, longest)

    ids, limits = (pad(x) for x in token_ids(offsets, q.shape[0], request.rule.contextual_seq_len, request.num_targets))
    query_id, key_id = ids[:, :, None], ids[:, None, :]
    same = torch.eye(longest, dtype=torch.bool, device=q.device)
    mask = allowed(request.rule, query_id, key_id, same, limits[:, :, None])
    present = torch.arange(longest, device=q.device) < lengths[:, None]
    mask = mask & present[:, None, :] | same  # a row of the padding sees itself, so that no row sees nothing

    scores = torch.einsum("bihd,bjhd->bhij", pad(q).to(dtype), pad(k).to(dtype)) * request.scale
    if position_weight is not None:
        distance = torch.where(mask, key_id - query_id, 0)
        scores = scores + position_weight.to(dtype)[request.max_seq_len - 1 + distance].unsqueeze(1)
    if time_weight is not None:
        assert request.query_time is not None
        assert request.key_time is not None
        delta = pad(request.query_time)[:, :, None] - pad(request.key_time)[:, None, :]
        buckets = time_bucket_reference(delta, time_weight.shape[0] - 1)
        scores = scores + time_weight.to(dtype)[buckets].unsqueeze(1)
    weights = torch.softmax(scores.masked_fill(~mask.unsqueeze(1), float("-inf")), 3)
    if request.drops:
        assert request.dropout_keys is not None
        heads = [derive_keys(pad(request.dropout_keys), head) for head in range(q.shape[1])]
        weights = weights * dropout_scale(torch.stack(heads, 1), longest, request.dropout).to(dtype)
    out = torch.einsum("bhij,bjhd->bihd", weights, pad(v).to(dtype))
    return padded_to_jagged(out, offsets).to(v.dtype)


def forward(request: SoftmaxAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    return attention(request, request.q, request.k, request.v, request.position_weight, request.time_weight)


def backward(request: SoftmaxAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    inputs = (request.q, request.k, request.v, request.position_weight, request.time_weight)
    return backward_by_autograd(lambda *leaves: attention(request, *leaves), grad, inputs)


BACKEND = Backend("reference", forward, backward)
