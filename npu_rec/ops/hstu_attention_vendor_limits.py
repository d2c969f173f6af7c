"""What the documented limits of RecSDK's attention operators are held against, and the widths they want."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.ops.vendor_support import dtype_refused, outside

MOST_SEQUENCES = 2048
LONGEST = 20480
MOST_HEADS = 16
DIM = 16  # head widths are multiples of it


@dataclass(frozen=True)
class Extremes:
    """Over the sequences of a batch: the shortest, the most targets of one, the least tokens that are no target."""

    shortest: int
    most_targets: int
    least_before_targets: int


_seen = WeakTensorKeyDictionary()  # offsets -> a reference to num_targets or None, and what was found


def extremes(request: HSTUAttentionRequest) -> Extremes:
    """Of a batch of at least one sequence. The host waits for the device once a batch, not in every layer."""
    offsets, targets = request.offsets, request.num_targets
    known: tuple[weakref.ref[Tensor] | None, Extremes] | None = _seen.get(offsets)
    if known is not None and (None if known[0] is None else known[0]()) is targets:
        return known[1]
    lengths = offsets_to_lengths(offsets)
    counts = torch.zeros_like(lengths) if targets is None else targets
    found = Extremes(*torch.stack([lengths.min(), counts.max(), (lengths - counts).min()]).tolist())
    _seen[offsets] = None if targets is None else weakref.ref(targets), found
    return found


def limits(request: HSTUAttentionRequest, widest: int, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The limits that the operators share (RecSDK's README files and host checks)."""
    batch, heads = request.offsets.shape[0] - 1, request.q.shape[1]
    reason = (
        dtype_refused(dtypes, request.q)
        or outside("the batch", batch, 1, MOST_SEQUENCES)
        or outside("max_seq_len", request.max_seq_len, 1, LONGEST)
        or outside("the number of heads", heads, 1, MOST_HEADS)
        or outside("the head width", max(request.q.shape[2], request.v.shape[2]), 1, widest)
    )
    if reason is None and extremes(request).shortest == 0:
        return "a sequence of the batch is empty"
    return reason


def widen(x: Tensor, request: HSTUAttentionRequest) -> Tensor:
    """`x [T, H, D]` with zeros appended to the one width that q, k and v get: the next multiple of 16.

    Neither q k^T nor the first channels of the result change.
    """
    width = max(request.q.shape[2], request.v.shape[2])
    return pad(x, (0, width + -width % DIM - x.shape[2]))


def widened(request: HSTUAttentionRequest) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v."""
    return widen(request.q, request), widen(request.k, request), widen(request.v, request)


def narrowed(request: HSTUAttentionRequest, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `widened` -> those of q, k, v."""
    qk, v = request.q.shape[2], request.v.shape[2]
    return dq[..., :qk].contiguous(), dk[..., :qk].contiguous(), dv[..., :v].contiguous()
