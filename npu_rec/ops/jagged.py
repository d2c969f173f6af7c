"""Jagged tensors: `values [T, ...]` of all sequences one after the other, `offsets [B + 1]` int64.

Sequence b owns `values[offsets[b]:offsets[b + 1]]`. Empty sequences, B = 0 and T = 0 are legal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import jagged_vendor


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """`lengths [B]` -> `offsets [B + 1]`, int64."""
    if jagged_vendor.takes_lengths(lengths):
        return jagged_vendor.lengths_to_offsets(lengths)
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def offsets_to_lengths(offsets: Tensor) -> Tensor:
    """`offsets [B + 1]` -> `lengths [B]`."""
    return offsets[1:] - offsets[:-1]


def sequence_of_token(offsets: Tensor, total: int) -> Tensor:
    """The sequence each of the `total` = T tokens belongs to, `[T]` int64."""
    sequences = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(sequences, offsets_to_lengths(offsets), output_size=total)


def position_of_token(offsets: Tensor, total: int) -> Tensor:
    """The place of each token inside its sequence, from 0, `[T]` int64."""
    return torch.arange(total, device=offsets.device) - offsets[sequence_of_token(offsets, total)]


def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int, fill: float = 0) -> Tensor:
    """`values [T, ...]` -> `[B, max_len, ...]`; tokens past `max_len` are cut off, gaps hold `fill`."""
    if max_len > 0 and jagged_vendor.takes_values(values, offsets):
        return jagged_vendor.jagged_to_padded(values, offsets, max_len, fill)
    padded = values.new_full((offsets.numel() - 1, max_len, *values.shape[1:]), fill)
    sequences = sequence_of_token(offsets, values.shape[0])
    positions = torch.arange(values.shape[0], device=values.device) - offsets[sequences]
    kept = positions < max_len
    return padded.index_put((sequences[kept], positions[kept]), values[kept])


def padded_to_jagged(padded: Tensor, offsets: Tensor) -> Tensor:
    """`padded [B, L, ...]` -> `values [T, ...]`; every length must be at most L."""
    total = int(offsets[-1])
    if total > 0 and jagged_vendor.takes_padded(padded, offsets):
        return jagged_vendor.padded_to_jagged(padded, offsets, total)
    sequences = sequence_of_token(offsets, total)
    return padded[sequences, torch.arange(total, device=padded.device) - offsets[sequences]]


def concat_jagged(left: Tensor, left_offsets: Tensor, right: Tensor, right_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Append `right`'s tokens to `left`'s, sequence by sequence: (values `[T1 + T2, ...]`, offsets)."""
    offsets = left_offsets + right_offsets
    total = left.shape[0] + right.shape[0]
    values = left.new_empty((total, *left.shape[1:]))
    left_sequence = sequence_of_token(left_offsets, left.shape[0])
    right_sequence = sequence_of_token(right_offsets, right.shape[0])
    left_place = torch.arange(left.shape[0], device=left.device) + right_offsets[left_sequence]
    right_place = torch.arange(right.shape[0], device=right.device) + left_offsets[right_sequence + 1]
    return values.index_put((left_place,), left).index_put((right_place,), right), offsets


def split_jagged(values: Tensor, offsets: Tensor, left_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut each sequence after its first `left_lengths [B]` tokens: (left, its offsets, right, its offsets)."""
    sequences = sequence_of_token(offsets, values.shape[0])
    positions = torch.arange(values.shape[0], device=values.device) - offsets[sequences]
    in_left = positions < left_lengths[sequences]
    lengths = offsets_to_lengths(offsets)
    left_lengths = torch.minimum(left_lengths, lengths)
    return (
        values[in_left],
        lengths_to_offsets(left_lengths),
        values[~in_left],
        lengths_to_offsets(lengths - left_lengths),
    )


def last_k(values: Tensor, offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The last `k` tokens of each sequence (all of a shorter one): (values, offsets)."""
    lengths = offsets_to_lengths(offsets)
    _, _, values, offsets = split_jagged(values, offsets, (lengths - k).clamp_min(0))
    return values, offsets
