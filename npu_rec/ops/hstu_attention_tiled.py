"""`hstu_attention` in plain PyTorch without an N x N tensor: the fallback on every device.

Each sequence is cut into blocks of `BLOCK` tokens. A tile is the queries of a block against the keys of
a block of the same sequence; tiles of the whole batch are computed together, those of one diagonal (query
block minus key block) at a time. On a diagonal no block occurs twice as query or as key, so
results are added without conflicts, in a fixed order. Scores and bias are recomputed in the
backward pass, a tile at a time.

Rows that a block has beyond its sequence, or before its first query, point to the last row of the padded
inputs, which is zero. So a missing key adds nothing, and a missing query adds only to the last row of the
outputs, which is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.ops.masks import allowed, token_ids
from npu_rec.ops.registry import Backend
from npu_rec.ops.time_buckets import time_bucket

BLOCK = 64
SCORES_AT_ONCE = 1 << 20  # bounds the memory: a few tensors of so many scores are alive at a time


@dataclass
class _Tiles:
    """Some tiles of one diagonal: the rows `[G, BLOCK]` of their queries and of their keys."""

    query: Tensor
    key: Tensor
    diagonal: int


def _tiles(request: HSTUAttentionRequest) -> Iterator[_Tiles]:
    """All tiles that the mask may leave something of."""
    (queries, heads), keys = request.q.shape[:2], request.k.shape[0]
    device = request.q.device
    lengths = offsets_to_lengths(request.offsets)
    blocks = (lengths + BLOCK - 1) // BLOCK
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), blocks)
    first = torch.cumsum(blocks, 0) - blocks
    block = torch.arange(sequence.numel(), device=device) - first[sequence]
    places = block[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    present = places < lengths[sequence, None]
    key_rows = torch.where(present, places + request.offsets[sequence, None], keys)
    start = (lengths - offsets_to_lengths(request.offsets_of_queries))[sequence]  # the first query's place
    asks = ((block + 1) * BLOCK > start) & (start < lengths[sequence])
    asked = present & (places >= start[:, None])
    query_rows = torch.where(asked, places - start[:, None] + request.offsets_of_queries[sequence, None], queries)

    rule = request.rule
    longest = int(blocks.max()) if blocks.numel() else 0
    farthest = longest - 1
    if rule.max_attn_len > 0 and rule.min_full_attn_seq_len == 0 and rule.contextual_seq_len == 0:
        # targets share one id: a target's window starts up to its number of fellow targets earlier
        slack = 0 if request.num_targets is None or longest == 0 else int(request.num_targets.max())
        farthest = min(farthest, (rule.max_attn_len + slack + BLOCK - 1) // BLOCK)
    together = max(1, SCORES_AT_ONCE // (heads * BLOCK * BLOCK))
    for diagonal in range(0 if rule.causal and rule.contextual_seq_len == 0 else 1 - longest, farthest + 1):
        partner = block - diagonal
        wanted = (partner >= 0) & (partner < blocks[sequence]) & asks
        if diagonal < 0 and rule.causal:  # above the diagonal only contextual rows see something
            wanted &= block * BLOCK < rule.contextual_seq_len
        for query in wanted.nonzero().squeeze(1).split(together):
            if query.numel() > 0:
                yield _Tiles(query_rows[query], key_rows[query - diagonal], diagonal)


class _Work:
    """The request with a zero row added to everything, and the parts a tile is made of."""

    def __init__(self, request: HSTUAttentionRequest) -> None:
        self.request = request
        self.dtype = request.compute_dtype
        self.q, self.k, self.v = (self.padded(x) for x in (request.q, request.k, request.v))
        rule, tokens = request.rule, request.tokens_of_queries
        ids, limits = token_ids(request.offsets, request.k.shape[0], rule.contextual_seq_len, request.num_targets)
        self.query_ids, self.limits = _with_zero_row(ids[tokens]), _with_zero_row(limits[tokens])
        self.key_ids = _with_zero_row(ids)
        # ids that count every token up make position bias and mask the same in all tiles of a diagonal
        self.plain = request.num_targets is None and request.rule.contextual_seq_len == 0
        if request.query_time is not None and request.key_time is not None:
            self.query_time, self.key_time = _with_zero_row(request.query_time), _with_zero_row(request.key_time)

    def padded(self, x: Tensor) -> Tensor:
        return _with_zero_row(x.to(self.dtype)).flatten(1)

    def heads(self, padded: Tensor, rows: Tensor) -> Tensor:
        """Rows `[G, BLOCK]` of `padded [T + 1, H * D]`, T queries or keys, as `[G, H, BLOCK, D]`."""
        tile = padded.index_select(0, rows.flatten()).view(*rows.shape, self.request.q.shape[1], -1)
        return tile.transpose(1, 2)

    def ids_of(self, tiles: _Tiles) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of queries `[G, BLOCK, 1]` and keys `[G, 1, BLOCK]`, and limits; G = 1 when all tiles agree."""
        if self.plain and (self.request.rule.min_full_attn_seq_len == 0 or self.request.rule.max_attn_len == 0):
            places = torch.arange(BLOCK, device=self.key_ids.device)
            return (places + tiles.diagonal * BLOCK)[None, :, None], places[None, None, :], places[:1, None, None]
        return (
            self.query_ids[tiles.query].unsqueeze(2),
            self.key_ids[tiles.key].unsqueeze(1),
            self.limits[tiles.query].unsqueeze(2),
        )

    def mask(self, tiles: _Tiles) -> Tensor | None:
        """`[G or 1, 1, BLOCK, BLOCK]`, or None where all is allowed."""
        rule = self.request.rule
        if self.plain and rule.causal and rule.max_attn_len == 0 and tiles.diagonal > 0:
            return None
        query_id, key_id, limit = self.ids_of(tiles)
        same = torch.zeros(BLOCK, BLOCK, dtype=torch.bool, device=query_id.device)
        if tiles.diagonal == 0:
            same.fill_diagonal_(True)
        return allowed(rule, query_id, key_id, same, limit).unsqueeze(1)

    def position_index(self, tiles: _Tiles) -> Tensor:
        """`[G or 1, BLOCK, BLOCK]` entries of the position table; missing rows are kept inside it."""
        query_id, key_id, _ = self.ids_of(tiles)
        size = 2 * self.request.max_seq_len - 1
        return (key_id - query_id + self.request.max_seq_len - 1).clamp_(0, size - 1)

    def time_index(self, tiles: _Tiles) -> Tensor:
        """`[G, BLOCK, BLOCK]` buckets."""
        assert self.request.time_weight is not None
        delta = self.query_time[tiles.query].unsqueeze(2) - self.key_time[tiles.key].unsqueeze(1)
        return time_bucket(delta, self.request.time_weight.shape[0] - 1)

    def scores(self, tiles: _Tiles, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores `[G, H, BLOCK, BLOCK]` with the bias, and the bias tables' indices."""
        scores = torch.matmul(q, k.transpose(2, 3)).mul_(self.request.alpha)
        position_index = time_index = None
        if self.request.position_weight is not None:
            position_index = self.position_index(tiles)
            scores += self.request.position_weight.to(self.dtype).take(position_index).unsqueeze(1)
        if self.request.time_weight is not None:
            time_index = self.time_index(tiles)
            scores += self.request.time_weight.to(self.dtype).take(time_index).unsqueeze(1)
        return scores, position_index, time_index


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])


def _add_rows(total: Tensor, rows: Tensor, tile: Tensor) -> None:
    """Add `tile [G, H, BLOCK, D]` to rows `[G, BLOCK]` of `total [T + 1, H * D]`."""
    total.index_add_(0, rows.flatten(), tile.transpose(1, 2).reshape(rows.numel(), -1))


def _add_entries(total: Tensor, index: Tensor, d_scores: Tensor) -> None:
    """Add the gradient of the scores `[G, H, M, N]` to the table entries `index [G or 1, M, N]`."""
    per_entry = d_scores.sum(1).sum_to_size(index.shape)
    total.scatter_add_(0, index.flatten(), per_entry.flatten())


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[Tq, H, Dv]`."""
    work = _Work(request)
    out = work.v.new_zeros(work.q.shape[0], work.v.shape[1])
    for tiles in _tiles(request):
        scores, _, _ = work.scores(tiles, work.heads(work.q, tiles.query), work.heads(work.k, tiles.key))
        attended = torch.nn.functional.silu(scores, inplace=True)
        mask = work.mask(tiles)
        if mask is not None:
            attended *= mask
        _add_rows(out, tiles.query, torch.matmul(attended, work.heads(work.v, tiles.key)))
    return (out[:-1] / request.divisor).view(-1, *request.v.shape[1:]).to(request.v.dtype)


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    work = _Work(request)
    grad_padded = work.padded(grad / request.divisor)
    dq, dk, dv = (torch.zeros_like(x) for x in (work.q, work.k, work.v))
    d_position, d_time = (
        None if weight is None else weight.new_zeros(weight.shape, dtype=work.dtype)
        for weight in (request.position_weight, request.time_weight)
    )
    for tiles in _tiles(request):
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
        _add_rows(dv, tiles.key, torch.matmul(attended_masked.transpose(2, 3), d_out))
        # silu'(s) = sigmoid(s) + silu(s) * (1 - sigmoid(s))
        d_scores *= torch.addcmul(gate, attended, gate.neg().add_(1.0))
        _add_rows(dq, tiles.query, torch.matmul(d_scores, k))
        _add_rows(dk, tiles.key, torch.matmul(d_scores.transpose(2, 3), q))
        if d_position is not None and position_index is not None:
            _add_entries(d_position, position_index, d_scores)
        if d_time is not None and time_index is not None:
            _add_entries(d_time, time_index, d_scores)

    def rows(x: Tensor, like: Tensor, scale: float = 1.0) -> Tensor:
        return x[:-1].mul_(scale).view(like.shape).to(like.dtype)

    return (
        rows(dq, request.q, request.alpha),
        rows(dk, request.k, request.alpha),
        rows(dv, request.v),
        d_position
        if request.position_weight is None or d_position is None
        else d_position.to(request.position_weight.dtype),
        d_time if request.time_weight is None or d_time is None else d_time.to(request.time_weight.dtype),
    )


BACKEND = Backend("tiled", forward, backward)
