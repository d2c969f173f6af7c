"""Sums of the rows that share an index: sorted once, then each sum is one program's, in a fixed order.

So there are no atomics, and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_rec.kernels.triton.launch import block_of, rows_of, warps_of

SPLIT_ENTRIES = 256  # a sum is worth splitting from so many entries
SPLIT_PROGRAMS = 1024  # and only while there are fewer programs than this


@triton.jit
def segment_total(
    source, stride, weights, order, start, end, fan, width, BLOCK_ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum `[BLOCK]`, float32, over the entries e = order[start..end - 1] of `weights[e] * source[e // fan]`.

    `weights` None: ones. Entries fit int32.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    total = tl.full([BLOCK_ENTRIES, BLOCK], 0.0, tl.float32)
    for first in range(start, end, BLOCK_ENTRIES):
        places = first + tl.arange(0, BLOCK_ENTRIES)
        inside = places < end
        entries = tl.load(order + places, mask=inside, other=0).to(tl.int32)
        at = (entries // fan).to(tl.int64) * stride
        tile = tl.load(source + at[:, None] + columns, mask=inside[:, None] & (columns < width), other=0.0)
        tile = tile.to(tl.float32)
        if weights is not None:
            tile = tile * tl.load(weights + entries, mask=inside, other=0.0)[:, None]
        total += tile
    return tl.sum(total, 0)


@triton.jit
def add_kernel(
    out, source, weights, order, index, bounds, stride, fan, count, width,
    BLOCK_ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per segment and split: adds its part of the segment to `out[split, index]`."""
    segment, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    share = (end - begin + splits - 1) // splits
    start = begin + split * share
    end = tl.minimum(start + share, end)
    if start < end:
        columns = tl.arange(0, BLOCK)
        total = segment_total(source, stride, weights, order, start, end, fan, width, BLOCK_ENTRIES, BLOCK)
        row = split.to(tl.int64) * count + tl.load(index + start)
        at = out + row * width + columns
        tl.store(at, tl.load(at, mask=columns < width, other=0.0) + total, mask=columns < width)


def segments_of(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equal values of `index [n]` (0..count - 1, n >= 1) brought together, without waiting for the device.

    Returns:
        `index` sorted `[n]`, the order that sorts it `[n]`, and bounds `[min(n, count) + 1]` int32: the k-th smallest
        distinct value stands at places bounds[k]..bounds[k + 1] - 1; behind the last distinct value bounds are n.
    """
    if count < 2**31:
        index = index.to(torch.int32)  # half the passes of a radix sort
    index, order = index.sort(stable=True)
    begins = torch.zeros_like(index, dtype=torch.bool)
    begins[1:] = index[1:] != index[:-1]
    rank = begins.cumsum(0, dtype=torch.int32)
    ranks = torch.arange(min(index.shape[0], count) + 1, dtype=torch.int32, device=index.device)
    return index, order, torch.searchsorted(rank, ranks, out_int32=True)


def entries_at_once(entries: int, count: int) -> int:
    """Entries that a program of a sum reads at once, a power of two, when `entries` entries go to `count` rows."""
    return min(max(block_of(entries // count), 4), 64)


def splits_for(entries: int, count: int) -> int:
    """Programs that share a sum, when `entries` entries go to `count` rows."""
    return max(1, min(SPLIT_PROGRAMS // count, entries // (SPLIT_ENTRIES * count)))


def add_segments(out: Tensor, source: Tensor, index: Tensor, weights: Tensor) -> None:
    """Add `weights[e] * source[e // fan]` of each entry e to row `index[e]`, in parts that the caller adds up.

    Args:
        out: `[splits, U, D]` float32, contiguous.
        source: `[t, D]`, its rows packed (launch.packed).
        index: `[t * fan]`, 0..U - 1; fewer than 2^31.
        weights: `[t * fan]` float32, contiguous.
    """
    splits, count, width = out.shape
    sorted_index, order, bounds = segments_of(index, count)
    block = block_of(width)
    entries = rows_of(block, entries_at_once(index.shape[0], count))
    add_kernel[(bounds.shape[0] - 1, splits)](
        out, source, weights, order, sorted_index, bounds, source.stride(0), index.shape[0] // source.shape[0],
        count, width, BLOCK_ENTRIES=entries, BLOCK=block, num_warps=warps_of(entries * block),
    )  # fmt: skip
