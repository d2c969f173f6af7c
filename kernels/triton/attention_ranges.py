"""Which tiles of a sequence's score matrix hold anything: loop bounds of the attention kernels.

Arguments as in attention_tile.py; `history` is the place of the first target.
"""

import triton
import triton.language as tl


@triton.jit
def key_ranges(
    query_begin, length, history, shift, limit, context, window, full,
    CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For the rows from `query_begin`: begin and end of the keys before the diagonal tiles, and the end of those.

    Targets between the history and the diagonal are left out: no other target sees them.
    """
    query_end = tl.minimum(query_begin + BM, length)
    begin = 0
    if HAS_WINDOW:
        least = tl.maximum(query_begin - shift, 0)
        most = tl.maximum(query_end - 1 - shift, 0)
        if HAS_TARGETS:
            least, most = tl.minimum(least, limit), tl.minimum(most, limit)
        farthest = least - window  # the lowest id in reach; id 0 begins at place 0
        begin = tl.where(farthest > 0, farthest + shift, 0)
        begin = tl.where((full > 0) & (most >= limit - full), 0, begin) // BN * BN
    end = query_begin
    if HAS_TARGETS:
        end = tl.minimum(query_begin, tl.cdiv(history, BN) * BN)
    diagonal_end = query_end
    if not CAUSAL:
        diagonal_end = length
    if HAS_CONTEXT:
        diagonal_end = tl.where(query_begin < context, length, diagonal_end)
    return begin, end, diagonal_end


@triton.jit
def query_ranges(
    key_begin, length, history, shift, context, window, full,
    CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For the keys from `key_begin`, queries in three ranges that begin at multiples of BM: context 0..`context_end`,
    `begin`..`end`, and the rows of full attention `tail`..length."""
    key_end = tl.minimum(key_begin + BN, length)
    begin = 0
    if CAUSAL:
        begin = key_begin // BM * BM
    context_end = 0
    if HAS_CONTEXT:
        context_end = tl.minimum(tl.cdiv(context, BM) * BM, begin)
    end = length
    if HAS_WINDOW:
        latest_id = tl.maximum(key_end - 1 - shift, 0)
        end = tl.minimum(length, latest_id + window + shift + 1)
        if HAS_TARGETS:
            end = tl.where(history < end, length, end)  # targets share the id of the first of them
    if CAUSAL and HAS_TARGETS:
        end = tl.where(key_begin >= history, key_end, end)
    tail = length
    if HAS_WINDOW:
        first_full = tl.maximum(history - full, 0) // BM * BM
        tail = tl.where(full > 0, tl.maximum(tl.cdiv(end, BM) * BM, first_full), length)
        if CAUSAL:
            tail = tl.where(key_begin >= history, length, tail)
    return context_end, begin, end, tail
