"""`hstu_attention` in plain PyTorch without an N x N tensor: the fallback on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.attention_tiles import Work, add_entries, add_rows, gradients, tiles_of
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.registry import Backend


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[Tq, H, Dv]`."""
    work = Work(request)
    out = work.v.new_zeros(work.q.shape[0], work.v.shape[1])
    for tiles in tiles_of(request):
        scores, _, _ = work.scores(tiles, work.heads(work.q, tiles.query), work.heads(work.k, tiles.key))
        attended = torch.nn.functional.silu(scores, inplace=True)
        mask = work.mask(tiles)
        if mask is not None:
            attended *= mask
        add_rows(out, tiles.query, torch.matmul(attended, work.heads(work.v, tiles.key)))
    return (out[:-1] / request.divisor).view(-1, *request.v.shape[1:]).to(request.v.dtype)


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    work = Work(request)
    grad_padded = work.padded(grad / request.divisor)
    dq, dk, dv, d_position, d_time = work.zeros()
    for tiles in tiles_of(request):
        q, k, v = work.heads(work.q, tiles.query), work.heads(work.k, tiles.key), work.heads(work.v, tiles.key)
        d_out = work.heads(grad_padded, tiles.query)
        scores, position_index, time_index = work.scores(tiles, q, k)
        mask = work.mask(tiles)
        gate = torch.sigmoid(scores)
        attended = scores * gate
        d_scores = torch.matmul(d_out, v.transpose(2, 3))
        if mask is not None:
            d_scores *= mask
            attended_masked = attended * mask
        else:
            attended_masked = attended
        add_rows(dv, tiles.key, torch.matmul(attended_masked.transpose(2, 3), d_out))
        # silu'(s) = sigmoid(s) + silu(s) * (1 - sigmoid(s))
        d_scores *= torch.addcmul(gate, attended, gate.neg().add_(1.0))
        add_rows(dq, tiles.query, torch.matmul(d_scores, k))
        add_rows(dk, tiles.key, torch.matmul(d_scores.transpose(2, 3), q))
        if d_position is not None and position_index is not None:
            add_entries(d_position, position_index, d_scores)
        if d_time is not None and time_index is not None:
            add_entries(d_time, time_index, d_scores)
    return gradients(request, dq, dk, dv, d_position, d_time)


BACKEND = Backend("tiled", forward, backward)
