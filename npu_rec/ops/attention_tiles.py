"""Attention in plain PyTorch without an N x N tensor: how a batch is cut into tiles, and what a tile is made of.

Each sequence is cut into blocks of `BLOCK` tokens. A tile is the queries of a block against the keys of
a block of the same sequence; tiles of the whole batch are computed together, those of one diagonal (query
block minus key block) at a time. On a diagonal no block occurs twice as query or as key, so
results are added without conflicts, in a fixed order. Scores and bias are recomputed in the
backward pass, a tile at a time.

Rows that a block has beyond its sequence, or before its first query, point to the last row of the padded
inputs, which is zero. So a missing query has results in the last row of the outputs alone, which is dropped; a missing
key adds nothing to products, and a softmax has to leave it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.attention_request import AttentionRequest
from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.ops.masks import allowed, token_ids
from npu_rec.ops.time_buckets import time_bucket

BLOCK = 64
SCORES_AT_ONCE = 1 << 20  # bounds the memory: a few tensors of so many scores are alive at a time


@dataclass
class Tiles:
    """Some tiles of one diagonal: the rows `[G, BLOCK]` of their queries and keys, the keys' places in the sequence."""

    query: Tensor
    key: Tensor
    places: Tensor
    diagonal: int


def tiles_of(request: AttentionRequest) -> Iterator[Tiles]:
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
                partners = query - diagonal
                yield Tiles(query_rows[query], key_rows[partners], places[partners], diagonal)


class Work:
    """The request with a zero row added to everything, and the parts a tile is made of."""

    def __init__(self, request: AttentionRequest) -> None:
        self.request = request
        self.dtype = request.compute_dtype
        self.q, self.k, self.v = (self.padded(x) for x in (request.q, request.k, request.v))
        rule, tokens = request.rule, request.tokens_of_queries
        ids, limits = token_ids(request.offsets, request.k.shape[0], rule.contextual_seq_len, request.num_targets)
        self.query_ids, self.limits = with_zero_row(ids[tokens]), with_zero_row(limits[tokens])
        self.key_ids = with_zero_row(ids)
        # ids that count every token up make position bias and mask the same in all tiles of a diagonal
        self.plain = request.num_targets is None and request.rule.contextual_seq_len == 0
        if request.query_time is not None and request.key_time is not None:
            self.query_time, self.key_time = with_zero_row(request.query_time), with_zero_row(request.key_time)

    def padded(self, x: Tensor) -> Tensor:
        return with_zero_row(x.to(self.dtype)).flatten(1)

    def heads(self, padded: Tensor, rows: Tensor) -> Tensor:
        """Rows `[G, BLOCK]` of `padded [T + 1, H * D]`, T queries or keys, as `[G, H, BLOCK, D]`."""
        tile = padded.index_select(0, rows.flatten()).view(*rows.shape, self.request.q.shape[1], -1)
        return tile.transpose(1, 2)

    def ids_of(self, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of queries `[G, BLOCK, 1]` and keys `[G, 1, BLOCK]`, and limits; G = 1 when all tiles agree."""
        if self.plain and (self.request.rule.min_full_attn_seq_len == 0 or self.request.rule.max_attn_len == 0):
            places = torch.arange(BLOCK, device=self.key_ids.device)
            return (places + tiles.diagonal * BLOCK)[None, :, None], places[None, None, :], places[:1, None, None]
        return (
            self.query_ids[tiles.query].unsqueeze(2),
            self.key_ids[tiles.key].unsqueeze(1),
            self.limits[tiles.query].unsqueeze(2),
        )

    def mask(self, tiles: Tiles) -> Tensor | None:
        """`[G or 1, 1, BLOCK, BLOCK]`, or None where all is allowed."""
        rule = self.request.rule
        if self.plain and rule.causal and rule.max_attn_len == 0 and tiles.diagonal > 0:
            return None
        query_id, key_id, limit = self.ids_of(tiles)
        same = torch.zeros(BLOCK, BLOCK, dtype=torch.bool, device=query_id.device)
        if tiles.diagonal == 0:
            same.fill_diagonal_(True)
        return allowed(rule, query_id, key_id, same, limit).unsqueeze(1)

    def position_index(self, tiles: Tiles) -> Tensor:
        """`[G or 1, BLOCK, BLOCK]` entries of the position table; missing rows are kept inside it."""
        query_id, key_id, _ = self.ids_of(tiles)
        size = 2 * self.request.max_seq_len - 1
        return (key_id - query_id + self.request.max_seq_len - 1).clamp_(0, size - 1)

    def present(self, tiles: Tiles) -> Tensor:
        """`[G, 1, 1, BLOCK]`: False where a block has no key any more."""
        return (tiles.key != self.key_ids.shape[0] - 1)[:, None, None, :]

    def time_index(self, tiles: Tiles) -> Tensor:
        """`[G, BLOCK, BLOCK]` buckets."""
        assert self.request.time_weight is not None
        delta = self.query_time[tiles.query].unsqueeze(2) - self.key_time[tiles.key].unsqueeze(1)
        return time_bucket(delta, self.request.time_weight.shape[0] - 1)

    def scores(self, tiles: Tiles, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
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

    def zeros(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Where the gradients of q, k, v and the two tables are summed."""
        d_position, d_time = (
            None if weight is None else weight.new_zeros(weight.shape, dtype=self.dtype)
            for weight in (self.request.position_weight, self.request.time_weight)
        )
        return torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v), d_position, d_time


def with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])


def add_rows(total: Tensor, rows: Tensor, tile: Tensor) -> None:
    """Add `tile [G, H, BLOCK, D]` to rows `[G, BLOCK]` of `total [T + 1, H * D]`."""
    total.index_add_(0, rows.flatten(), tile.transpose(1, 2).reshape(rows.numel(), -1))


def add_entries(total: Tensor, index: Tensor, d_scores: Tensor) -> None:
    """Add the gradient of the scores `[G, H, M, N]` to the table entries `index [G or 1, M, N]`."""
    per_entry = d_scores.sum(1).sum_to_size(index.shape)
    total.scatter_add_(0, index.flatten(), per_entry.flatten())


def gradients(
    request: AttentionRequest, dq: Tensor, dk: Tensor, dv: Tensor, d_position: Tensor | None, d_time: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a backward pass returns, from sums `[T + 1, H * D]` and those of the tables."""

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
