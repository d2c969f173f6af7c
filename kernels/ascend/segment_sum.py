"""Rows by index on Ascend: gathered to a tile, and the sums of rows that share an index.

A row costs a scalar load of its index and one contiguous load. A load with a tile of computed addresses would read past
the end of a row, up to the width of the block; so gathered rows are as wide as the block (`padded`) and need no mask.
Sums: sorted once, then each is one program's, in a fixed order: no atomics, and the same inputs give the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from npu_rec.kernels.triton.launch import block_of, packed
from npu_rec.kernels.triton.segment_sum import segments_of

NARROWEST = 16  # elements of a block: 32 bytes of bfloat16, the granule of a vector core's memory
TILE = 4096  # elements of a tile of gathered rows
MOST_ROWS = 16  # of a tile: so many loads are under way together


@triton.jit
def joined_rows(matrix, stride, index, place, last, columns, ROWS: tl.constexpr):
    """`matrix[index[p]]` for p = place..place + ROWS - 1, but at most `last`, one behind the other: `[ROWS * BLOCK]`.

    `tl.cat` keeps the order on Ascend (and in the interpreter), though not on every device.
    """
    if ROWS == 1:
        row = tl.load(index + tl.minimum(place, last)).to(tl.int64)
        return tl.load(matrix + row * stride + columns)
    else:
        HALF: tl.constexpr = ROWS // 2
        return tl.cat(
            joined_rows(matrix, stride, index, place, last, columns, HALF),
            joined_rows(matrix, stride, index, place + HALF, last, columns, HALF),
            can_reorder=True,
        )


@triton.jit
def segment_total(source, stride, weights, index, begin, end, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum `[BLOCK]`, float32, of `weights[e] * source[index[e]]` over the entries e = begin..end - 1.

    By tiles, and the last entries, too few for one, row by row. `weights` None: ones.
    """
    total = tl.full([BLOCK], 0.0, tl.float32)
    whole = begin + (end - begin) // ROWS * ROWS
    for first in range(begin, whole, ROWS):
        tile = joined_rows(source, stride, index, first, end - 1, columns, ROWS).reshape([ROWS, BLOCK]).to(tl.float32)
        if weights is not None:
            tile = tile * tl.load(weights + first + tl.arange(0, ROWS))[:, None]
        total += tl.sum(tile, 0)
    for entry in range(whole, end):
        row = joined_rows(source, stride, index, entry, entry, columns, 1).to(tl.float32)
        if weights is not None:
            row = row * tl.load(weights + entry)
        total += row
    return total


@triton.jit(do_not_specialize=["segments"])
def add_kernel(
    out, source, weights, index, rows, bounds, segments, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Segments in turn: adds the sum of each to its row of `out`."""
    columns = tl.arange(0, BLOCK)
    for segment in range(tl.program_id(0), segments, tl.num_programs(0)):
        begin, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
        if begin < end:
            total = segment_total(source, stride, weights, index, begin, end, columns, ROWS, BLOCK)
            at = out + tl.load(rows + begin).to(tl.int64) * WIDTH + columns
            tl.store(at, tl.load(at, mask=columns < WIDTH, other=0.0) + total, mask=columns < WIDTH)


def block_for(width: int) -> int:
    """Width of the block that holds rows of `width`."""
    return max(block_of(width), NARROWEST)


def rows_for(block: int, most: int = MOST_ROWS) -> int:
    """Rows of a tile `block` wide, when there are at most so many: a power of two from 2 to 16."""
    return max(2, min(TILE // block, block_of(most), MOST_ROWS))


def padded(x: Tensor) -> Tensor:
    """`x [T, C]` with zeros behind each row up to the block's width, a stride of 1 along the rows."""
    missing = block_for(x.shape[1]) - x.shape[1]
    return pad(x, (0, missing)) if missing else packed(x)


def add_segments(out: Tensor, source: Tensor, index: Tensor, weights: Tensor, programs: int) -> None:
    """Add `weights[e] * source[e // fan]` of each entry e to row `index[e]` of `out`.

    Args:
        out: `[U, D]` float32, contiguous.
        source: `[t, D]` as `padded` gives it.
        index: `[t * fan]`, 0..U - 1; fewer than 2^31.
        weights: `[t * fan]` float32.
    """
    count, width = out.shape
    block = block_for(width)
    rows, order, bounds = segments_of(index, count)
    add_kernel[(programs,)](
        out, source, weights[order], order // (index.shape[0] // source.shape[0]), rows, bounds, bounds.shape[0] - 1,
        source.stride(0), WIDTH=width, ROWS=rows_for(block), BLOCK=block,
    )  # fmt: skip
