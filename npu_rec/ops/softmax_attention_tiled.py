"""`softmax_attention` in plain PyTorch without an N x N tensor: the fallback on every device.

The forward pass keeps of each row the highest score so far, and the sums below relative to it (online softmax,
arXiv 1805.02867). The backward pass runs it again, for nothing but q, k and v is saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npu_rec.ops.attention_tiles import Tiles, Work, add_entries, add_rows, gradients, tiles_of, with_zero_row
from npu_rec.ops.random import derive_keys, dropout_scale_at
from npu_rec.ops.registry import Backend
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest

Scores = tuple[Tensor, Tensor | None, Tensor | None]


class _SoftmaxWork(Work):
    """`Work` with the scores of a softmax and the draws of its dropout."""

    def __init__(self, request: SoftmaxAttentionRequest) -> None:
        super().__init__(request)
        self.probability, heads = request.dropout, request.q.shape[1]
        self.dropout_keys: Tensor | None = None
        if request.drops and request.dropout_keys is not None:
            keys = with_zero_row(request.dropout_keys)
            self.dropout_keys = torch.stack([derive_keys(keys, head) for head in range(heads)], 1)  # [T + 1, H]

    def visible_scores(self, tiles: Tiles, q: Tensor, k: Tensor) -> Scores:
        """`scores` with -inf where a query does not see the key."""
        scores, position_index, time_index = self.scores(tiles, q, k)
        mask, present = self.mask(tiles), self.present(tiles)
        scores.masked_fill_(~(present if mask is None else mask & present), float("-inf"))
        return scores, position_index, time_index

    def dropped(self, tiles: Tiles, weights: Tensor) -> Tensor:
        """`weights [G, H, BLOCK, BLOCK]`, or their gradient, times the multipliers of dropout."""
        if self.dropout_keys is None:
            return weights
        keys = self.dropout_keys[tiles.query].transpose(1, 2)
        return weights * dropout_scale_at(keys, tiles.places[:, None, None, :], self.probability).to(self.dtype)


def _averages(
    work: _SoftmaxWork, width: int, terms: Callable[[Tiles, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Sums over the keys of a row, weighted by the softmax, and the logarithm of the row's sum of exponentials.

    Args:
        terms: of a tile, its exponentials `[G, H, BLOCK, BLOCK]` and values, to what is summed, `[G, H, BLOCK, width]`.

    Returns:
        `[T + 1, H, width]` and `[T + 1, H]`; the zero row has no meaning.
    """
    rows, heads = work.q.shape[0], work.request.q.shape[1]
    peak = work.q.new_full((rows, heads), torch.finfo(work.dtype).min)
    total, sums = work.q.new_zeros(rows, heads, 1), work.q.new_zeros(rows, heads, width)
    for tiles in tiles_of(work.request):
        q, k, v = work.heads(work.q, tiles.query), work.heads(work.k, tiles.key), work.heads(work.v, tiles.key)
        scores, _, _ = work.visible_scores(tiles, q, k)
        before = peak[tiles.query].transpose(1, 2)  # [G, H, BLOCK]
        after = torch.maximum(before, scores.amax(3))
        weights, fade = scores.sub_(after.unsqueeze(3)).exp_(), (before - after).exp_()
        _add_faded(total, tiles.query, fade, weights.sum(3, keepdim=True))
        _add_faded(sums, tiles.query, fade, terms(tiles, weights, v))
        peak[tiles.query.flatten()] = after.transpose(1, 2).flatten(0, 1)
    return sums / total, peak + total.squeeze(2).log()


def _add_faded(sums: Tensor, rows: Tensor, fade: Tensor, tile: Tensor) -> None:
    """Multiply rows `[G, BLOCK]` of `sums [T + 1, H, C]` by `fade [G, H, BLOCK]` and add `tile [G, H, BLOCK, C]`."""
    at, factor = rows.flatten(), fade.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    sums[at] = sums[at] * factor + tile.transpose(1, 2).flatten(0, 1)


def forward(request: SoftmaxAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    work = _SoftmaxWork(request)

    def values(tiles: Tiles, weights: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(work.dropped(tiles, weights), v)

    out, _ = _averages(work, request.v.shape[2], values)
    return out[:-1].to(request.v.dtype)


def backward(request: SoftmaxAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    work = _SoftmaxWork(request)
    grad_padded = work.padded(grad)

    def of_weights(tiles: Tiles, v: Tensor) -> Tensor:
        return work.dropped(tiles, torch.matmul(work.heads(grad_padded, tiles.query), v.transpose(2, 3)))

    # sum_j w_j dw_j: of the output and its gradient it would be the same, but for rounding
    average, log_sum = _averages(work, 1, lambda tiles, w, v: w.mul_(of_weights(tiles, v)).sum(3, keepdim=True))
    average[-1], log_sum[-1] = 0.0, float("inf")  # no weights, no gradients for missing queries
    dq, dk, dv, d_position, d_time = work.zeros()
    for tiles in tiles_of(request):
        q, k, v = work.heads(work.q, tiles.query), work.heads(work.k, tiles.key), work.heads(work.v, tiles.key)
        d_out = work.heads(grad_padded, tiles.query)
        scores, position_index, time_index = work.visible_scores(tiles, q, k)
        weights = scores.sub_(log_sum[tiles.query].transpose(1, 2).unsqueeze(3)).exp_()
        d_scores = of_weights(tiles, v).sub_(average[tiles.query].transpose(1, 2)).mul_(weights)
        add_rows(dv, tiles.key, torch.matmul(work.dropped(tiles, weights).transpose(2, 3), d_out))
        add_rows(dq, tiles.query, torch.matmul(d_scores, k))
        add_rows(dk, tiles.key, torch.matmul(d_scores.transpose(2, 3), q))
        if d_position is not None and position_index is not None:
            add_entries(d_position, position_index, d_scores)
        if d_time is not None and time_index is not None:
            add_entries(d_time, time_index, d_scores)
    return gradients(request, dq, dk, dv, d_position, d_time)


BACKEND = Backend("tiled", forward, backward)
