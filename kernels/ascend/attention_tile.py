"""Tiles of HSTU attention for Ascend's vector cores: the relative bias by gathers from tables in the unified buffer.

A load whose address is computed for every score would become a loop of scalar loads there, and a comparison of
integers a loop of scalar comparisons. So a tile's entries of the position table are loaded as one contiguous window
and gathered, the time bucket is computed in float32, and masks compare float32 (exact up to 2^24 tokens).
Arguments as in kernels/triton/attention_tile.py.
"""

import triton
import triton.language as tl

BUCKET_WIDTH: tl.constexpr = tl.constexpr(0.301)  # npu_rec.ops.time_buckets.DIVISOR


@triton.jit
def window_index(query_id, key_id, query_last, key_first):
    """Where in a window that begins at distance `key_first - query_last` the distance of each pair lies.

    `query_last`: the largest of the query ids; `key_first`: the smallest of the key ids.
    """
    return (key_id - key_first) + (query_last - query_id)


@triton.jit
def gathered(table, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`table[index]` for `index [ROWS, COLUMNS]`: one library call of the vector core on the flattened tile."""
    return tl.gather(table, index.reshape([ROWS * COLUMNS]), 0).reshape([ROWS, COLUMNS])


@triton.jit
def place_of(query_seconds, key_seconds):
    """`ln(max(|d|, 1)) / 0.301` of the interval d of each pair, from int32 seconds: the time bucket and a fraction.

    float32, as in Meta's code: an interval within float32 rounding of an edge may count to the bucket beside it.
    """
    seconds = tl.maximum(tl.abs((query_seconds - key_seconds).to(tl.float32)), 1.0, tl.PropagateNan.ALL)
    return tl.log(seconds) / BUCKET_WIDTH


@triton.jit
def bucket_of(place, buckets):
    """Time bucket, int32."""
    return tl.minimum(place.to(tl.int32), buckets)


@triton.jit
def bucket_range(query_seconds, key_seconds, query_inside, key_inside, buckets):
    """The lowest and the highest time bucket of a tile, from the extremes of its times; places outside do not count."""
    farthest = 1073741824  # more than any time, less than half of int32
    first_query, last_query = (
        tl.min(tl.where(query_inside, query_seconds, farthest)),
        tl.max(tl.where(query_inside, query_seconds, -farthest)),
    )
    first_key, last_key = (
        tl.min(tl.where(key_inside, key_seconds, farthest)),
        tl.max(tl.where(key_inside, key_seconds, -farthest)),
    )
    least = tl.maximum(tl.maximum(first_query - last_key, first_key - last_query), 0)
    most = tl.maximum(last_query - first_key, last_key - first_query)
    first = tl.max(bucket_of(place_of(least + tl.zeros([16], dtype=tl.int32), 0), buckets))
    last = tl.max(bucket_of(place_of(most + tl.zeros([16], dtype=tl.int32), 0), buckets))
    return first, last


@triton.jit
def keys_before(id, shift, limit, HAS_TARGETS: tl.constexpr):
    """How many tokens of a sequence have an id below `id`, with no end to the sequence: ids as in `ids_of`."""
    lowest = 0
    if HAS_TARGETS:
        lowest = tl.minimum(0, limit)
    before = tl.where(id.to(tl.float32) > lowest, id + shift, 0)
    if HAS_TARGETS:
        before = tl.where(id.to(tl.float32) > limit, 2147483647, before)
    return before


@triton.jit
def merged(
    first_keys, query_id, query_first, key_first, key_begin, shift, limit,
    HAS_TARGETS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile whose sums of first keys are `first_keys`, with the rows of one id added up, then the columns.

    Context shares an id, and so do targets. Row r of the result is that of id `query_first + r`, column c that of
    `key_first + c`: rows by a product with a matrix of zeros and ones, columns as differences of sums.
    """
    of_rows = (query_id - query_first).to(tl.float32)[None, :] == tl.arange(0, ROWS).to(tl.float32)[:, None]
    first_keys = tl.dot(of_rows.to(tl.float32), first_keys, input_precision="ieee").reshape([ROWS * 2 * COLUMNS])
    row = tl.arange(0, ROWS)[:, None] * (2 * COLUMNS)
    id = key_first + tl.arange(0, COLUMNS)
    begin = tl.minimum(tl.maximum(keys_before(id, shift, limit, HAS_TARGETS) - key_begin, 0), COLUMNS)
    end = tl.minimum(tl.maximum(keys_before(id + 1, shift, limit, HAS_TARGETS) - key_begin, 0), COLUMNS)
    until_end = gathered(first_keys, row + end[None, :], ROWS, COLUMNS)
    return until_end - gathered(first_keys, row + begin[None, :], ROWS, COLUMNS)


@triton.jit
def diagonal_sums(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of `tile` where `column - row` is c, and where it is c - COLUMNS, for c < COLUMNS; ROWS <= COLUMNS.

    Row r is rotated left by r, which turns diagonals into columns.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    reached = (row + column).to(tl.float32)
    wraps = reached >= COLUMNS
    place = row * COLUMNS + row + column - tl.where(wraps, COLUMNS * 1.0, 0.0).to(tl.int32)
    rotated = gathered(tile.reshape([ROWS * COLUMNS]), place, ROWS, COLUMNS)
    return tl.sum(tl.where(wraps, 0.0, rotated), 0), tl.sum(tl.where(wraps, rotated, 0.0), 0)


@triton.jit
def sums_beyond(first_keys, reach, key_begin, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BUCKETS: tl.constexpr):
    """`[BUCKETS]`: sums over the pairs of a tile that are as far apart as a bucket's lower edge, or farther.

    `reach [ROWS, BUCKETS]`: how many of a sequence's keys lie so far back from each query. Keys are sorted, so these
    are sums of the first keys of each row, `first_keys [ROWS, 2 * COLUMNS]`: one gather picks them.
    """
    row = tl.arange(0, ROWS)[:, None] * (2 * COLUMNS)
    place = tl.minimum(tl.maximum(reach + (row - key_begin), row), row + COLUMNS)
    return tl.sum(gathered(first_keys.reshape([ROWS * 2 * COLUMNS]), place, ROWS, BUCKETS), 0)


@triton.jit
def sums_beyond_unsorted(tile, total, place, first, last, BUCKETS: tl.constexpr):
    """`sums_beyond` for keys in any order: a pass over the tile for each bucket in it, first..last.

    `total`: the sum of the tile; `place`: of each pair as in `place_of`.
    """
    lower = (tl.arange(0, BUCKETS) + 1).to(tl.float32)
    beyond = tl.where(lower <= first, total, 0.0)
    for edge in range(first + 1, last + 1):
        beyond += tl.where(lower == edge, tl.sum(tl.where(place >= edge, tile, 0.0)), 0.0)
    return beyond
