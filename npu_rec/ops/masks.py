"""Who may attend to whom: one rule for training, evaluation and serving.

The semantics are those of Meta's production attention (HSTU, arXiv 2402.17152).
For a sequence of n tokens, c leading contextual tokens and t trailing targets, the token at
place p has an id: all context shares id 0, history counts up from there, all targets share one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.jagged import offsets_to_lengths, sequence_of_token


@dataclass(frozen=True)
class MaskRule:
    """The parts of the mask that are the same for every sequence."""

    causal: bool = True
    contextual_seq_len: int = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0

    def __post_init__(self) -> None:
        for name in ("contextual_seq_len", "max_attn_len", "min_full_attn_seq_len"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


def token_ids(
    offsets: Tensor, total: int, contextual_seq_len: int, num_targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids of the `total` = T tokens and the id of their sequence's targets.

    Returns:
        (ids `[T]`, limits `[T]`), int64. `limits` is the number of history ids of the token's sequence.
    """
    sequences = sequence_of_token(offsets, total)
    positions = torch.arange(total, device=offsets.device) - offsets[sequences]
    limits = offsets_to_lengths(offsets)
    if num_targets is not None:
        limits = limits - num_targets
    ids = positions
    if contextual_seq_len > 0:
        limits = limits - contextual_seq_len + 1
        ids = (positions - contextual_seq_len + 1).clamp_min(0)
    limits = limits[sequences]
    return (ids if num_targets is None else torch.minimum(ids, limits)), limits


def token_of_query(offsets: Tensor, query_offsets: Tensor, total: int) -> Tensor:
    """The token that each of the `total` = Tq queries is, `[Tq]` int64, where the queries of a sequence are its last.

    Args:
        offsets: `[B + 1]` int64 of the tokens.
        query_offsets: `[B + 1]` int64 of the queries.
    """
    behind = offsets[1:] - query_offsets[1:]  # both count to the end of the sequence
    return torch.arange(total, device=offsets.device) + behind[sequence_of_token(query_offsets, total)]


def allowed(rule: MaskRule, query_id: Tensor, key_id: Tensor, same: Tensor, limit: Tensor) -> Tensor:
    """True where the query may see the key.

    Args:
        query_id, key_id: ids that broadcast against each other, say `[..., M, 1]` and `[..., 1, N]`.
        same: True where query and key are the same token.
        limit: the sequence's `limits`, broadcastable.
    """
    distance = query_id - key_id
    mask = same | (distance > 0) if rule.causal else same | (distance != 0)
    if rule.max_attn_len > 0:
        near = distance <= rule.max_attn_len
        if rule.min_full_attn_seq_len > 0:
            near = near | (query_id >= limit - rule.min_full_attn_seq_len)
        mask = mask & near
    if rule.contextual_seq_len > 0:
        mask = mask | ((query_id == 0) & (key_id < limit))
    return mask
