"""Tiles of HSTU attention: masks, scores with the relative bias, and the gradients of the two bias tables.

Places count the tokens of a sequence from 0; ids are those of the mask rule (docs/operators.md):
`id = clamp(place - shift, 0, limit)` with `shift = max(contextual_seq_len - 1, 0)`. Index arguments named `query_*`
and `key_*` are tiles that broadcast against each other, `[BM, 1]` and `[1, BN]` or the other way round, so that the
same functions serve a tile and its transpose. A "plain" request is causal without targets, context or window.
"""

import triton
import triton.language as tl


@triton.jit
def ids_of(place, shift, limit, HAS_TARGETS: tl.constexpr):
    """Ids of the tokens at `place`."""
    ids = tl.maximum(place - shift, 0)
    if HAS_TARGETS:
        ids = tl.minimum(ids, limit)
    return ids


@triton.jit
def allowed(
    query_place, key_place, query_id, key_id, length, limit, context, window, full,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """True where the query sees the key. Queries behind the end of the sequence may see anything."""
    if PLAIN:
        mask = query_place >= key_place
    else:
        distance = query_id - key_id
        others = distance > 0 if CAUSAL else distance != 0
        mask = (query_place == key_place) | others
        if HAS_WINDOW:
            mask = mask & ((distance <= window) | ((full > 0) & (query_id >= limit - full)))
        if HAS_CONTEXT:
            mask = mask | ((query_id == 0) & (key_id < limit))
        mask = mask & (key_place < length)
    return mask


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """`left @ right` in float32. `PRECISION` "float32" converts first: the interpreter cannot multiply bfloat16."""
    if PRECISION == "float32":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def bucket_range(query_time, key_time, edges, buckets, BLOCK_BUCKETS: tl.constexpr):
    """The lowest and the highest time bucket in a tile, from the extremes of its times.

    Along sorted times a bucket spans a factor of 1.35, so that a tile far from the diagonal holds one or two.
    """
    earliest_query, latest_query = tl.min(query_time), tl.max(query_time)
    earliest_key, latest_key = tl.min(key_time), tl.max(key_time)
    least = tl.maximum(tl.maximum(earliest_query - latest_key, earliest_key - latest_query), 0)
    most = tl.maximum(latest_query - earliest_key, latest_key - earliest_query)
    index = tl.arange(0, BLOCK_BUCKETS) + 1  # bucket b begins at edges[b]; bucket 0 at 0
    begins = tl.load(edges + index, mask=index <= buckets, other=2147483647)
    first = tl.sum((begins <= least).to(tl.int32))
    last = tl.sum((begins <= most).to(tl.int32))
    return first, last


@triton.jit
def time_bias(bias, seconds, first, last, time_weight, edges):
    """Adds `time_weight[bucket(seconds)]`, the buckets being within first..last."""
    found = tl.zeros_like(bias) + tl.load(time_weight + first)
    for bucket in range(first + 1, last + 1):
        found = tl.where(seconds >= tl.load(edges + bucket), tl.load(time_weight + bucket), found)
    return bias + found


@triton.jit
def time_gradient(gradient, d_scores, seconds, first, last, edges, BLOCK_BUCKETS: tl.constexpr):
    """Adds to `gradient [BLOCK_BUCKETS]` the sums of `d_scores` over the buckets first..last."""
    index = tl.arange(0, BLOCK_BUCKETS)
    for bucket in range(first, last + 1):
        inside = (seconds >= tl.load(edges + bucket)) & (seconds < tl.load(edges + bucket + 1))
        gradient += tl.where(index == bucket, tl.sum(tl.where(inside, d_scores, 0.0)), 0.0)
    return gradient


@triton.jit
def scores(
    left, right, query_id, key_id, query_time, key_time, first, last, alpha, position, time_weight, edges,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`alpha left @ right + bias` in float32; `position` points at the entry of distance 0."""
    tile = product(left, right, PRECISION) * alpha
    if HAS_POSITION:
        tile += tl.load(position + (key_id - query_id))
    if HAS_TIME:
        tile = time_bias(tile, tl.abs(query_time - key_time), first, last, time_weight, edges)
    return tile


@triton.jit
def silu_gradient(tile, sigmoid):
    """d silu / d score."""
    return sigmoid * (1.0 + tile * (1.0 - sigmoid))


@triton.jit
def diagonal_sums(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Sums along the diagonals of `tile [BM, BN]`, BM <= BN: where `column - row` is c, and where it is c - BN, c < BN.

    Row r is rotated left by r, which turns diagonals into columns.
    """
    row, column = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    reached = row + column
    rotated = tl.gather(tile, reached % BN, 1)
    return tl.sum(tl.where(reached < BN, rotated, 0.0), 0), tl.sum(tl.where(reached >= BN, rotated, 0.0), 0)


@triton.jit
def add_where_not_zero(target, index, values):
    """`target[index] += values`; a sum that is zero needs no place, so its index may lie outside."""
    tl.atomic_add(target + index, values, mask=values != 0.0, sem="relaxed")


@triton.jit
def position_gradient(
    gradient, d_scores, query_begin, key_begin, length, shift, limit, scale,
    PLAIN: tl.constexpr, HAS_TARGETS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds `d_scores [BM, BN]` times `scale` to the position gradient; `gradient` points at the entry of distance 0.

    Where ids count the places, an entry is a diagonal of the tile. Context shares id 0 and targets share id `limit`:
    their rows and columns are summed apart. Every sum goes to an address of its own, but for columns of shared id.
    """
    regular = d_scores
    if not PLAIN:
        query_place, key_place = query_begin + tl.arange(0, BM), key_begin + tl.arange(0, BN)
        query_id, key_id = ids_of(query_place, shift, limit, HAS_TARGETS), ids_of(key_place, shift, limit, HAS_TARGETS)
        query_low, query_high = query_place - shift < query_id, query_place - shift > query_id
        key_low, key_high = key_place - shift < key_id, key_place - shift > key_id
        query_counts = (query_place - shift == query_id)[:, None]
        regular = tl.where(query_counts & (key_place - shift == key_id)[None, :], d_scores, 0.0)
        low_id = 0  # of context
        if HAS_TARGETS:
            low_id = tl.minimum(0, limit)  # with less history than context the targets' id is below
        of_context = tl.sum(tl.where(query_low[:, None], d_scores, 0.0), 0)
        add_where_not_zero(gradient, key_id - low_id, of_context * scale)
        on_context = tl.sum(tl.where(query_counts & key_low[None, :], d_scores, 0.0), 1)
        add_where_not_zero(gradient, low_id - query_id, on_context * scale)
        if HAS_TARGETS:
            of_targets = tl.sum(tl.where(query_high[:, None], d_scores, 0.0), 0)
            add_where_not_zero(gradient, key_id - limit, of_targets * scale)
            on_targets = tl.sum(tl.where(query_counts & key_high[None, :], d_scores, 0.0), 1)
            add_where_not_zero(gradient, limit - query_id, on_targets * scale)
    straight, wrapped = diagonal_sums(regular, BM, BN)
    distance = key_begin - query_begin + tl.arange(0, BN)
    add_where_not_zero(gradient, distance, straight * scale)
    add_where_not_zero(gradient, distance - BN, wrapped * scale)
