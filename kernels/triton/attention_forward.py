"""HSTU attention, forward: one program computes BM rows of one head of one sequence."""

import triton
import triton.language as tl

from npu_rec.kernels.triton.attention_ranges import key_ranges
from npu_rec.kernels.triton.attention_tile import allowed, bucket_range, ids_of, product, scores


@triton.jit
def forward_rows(
    q, k, v, out, position, time_weight, query_time, key_time, edges,
    stride_q, stride_k, stride_v, stride_out,
    query_begin, length, targets, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """Rows `query_begin`..+BM of `out`; the pointers stand at token 0 of the sequence and at the head."""
    PLAIN: tl.constexpr = CAUSAL and not ((HAS_TARGETS or HAS_CONTEXT) or HAS_WINDOW)  # Triton 3.2 takes two at a time
    shift = tl.maximum(context - 1, 0)
    history, limit = length - targets, length - targets - shift
    query = query_begin + tl.arange(0, BM)
    query_inside = tl.minimum(query, length - 1)
    query_id = ids_of(query_inside, shift, limit, HAS_TARGETS)[:, None]
    at_qk, at_v = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    q_tile = tl.load(
        q + query[:, None].to(tl.int64) * stride_q + at_qk[None, :],
        mask=(query < length)[:, None] & (at_qk < QK)[None, :], other=0.0,
    )  # fmt: skip
    query_seconds = query_inside
    if HAS_TIME:
        query_seconds = tl.load(query_time + query_inside)
    begin, end, diagonal_end = key_ranges(
        query_begin, length, history, shift, limit, context, window, full,
        CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, BM, BN,
    )  # fmt: skip
    before = tl.cdiv(tl.maximum(end - begin, 0), BN)
    tiles = before + tl.cdiv(diagonal_end - query_begin, BN)
    result = tl.zeros([BM, BLOCK_V], dtype=tl.float32)
    for tile in range(0, tiles):
        key_begin = tl.where(tile < before, begin + tile * BN, query_begin + (tile - before) * BN)
        key = key_begin + tl.arange(0, BN)
        key_inside = tl.minimum(key, length - 1)
        key_id = ids_of(key_inside, shift, limit, HAS_TARGETS)[None, :]
        k_tile = tl.load(
            k + key[None, :].to(tl.int64) * stride_k + at_qk[:, None],
            mask=(key < length)[None, :] & (at_qk < QK)[:, None], other=0.0,
        )  # fmt: skip
        first, last, key_seconds = 0, 0, key_inside
        if HAS_TIME:
            key_seconds = tl.load(key_time + key_inside)
            first, last = bucket_range(query_seconds, key_seconds, edges, buckets, BLOCK_BUCKETS)
        score = scores(
            q_tile, k_tile, query_id, key_id, query_seconds[:, None], key_seconds[None, :], first, last, alpha,
            position, time_weight, edges, HAS_POSITION, HAS_TIME, PRECISION,
        )  # fmt: skip
        mask = allowed(
            query[:, None], key[None, :], query_id, key_id, length, limit, context, window, full,
            CAUSAL, PLAIN, HAS_CONTEXT, HAS_WINDOW,
        )  # fmt: skip
        attended = tl.where(mask, score * tl.sigmoid(score), 0.0)
        v_tile = tl.load(
            v + key[:, None].to(tl.int64) * stride_v + at_v[None, :],
            mask=(key < length)[:, None] & (at_v < V)[None, :], other=0.0,
        )  # fmt: skip
        result += product(attended.to(v_tile.dtype), v_tile, PRECISION)
    tl.store(
        out + query[:, None].to(tl.int64) * stride_out + at_v[None, :],
        (result * inverse_divisor).to(out.dtype.element_ty),
        mask=(query < length)[:, None] & (at_v < V)[None, :],
    )


@triton.jit
def forward_kernel(
    q, k, v, out, offsets, work, num_targets, position, time_weight, query_time, key_time, edges,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    heads, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """One item of `work` (schedule.py) and one head a program."""
    item, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    sequence, block = tl.load(work + 2 * item), tl.load(work + 2 * item + 1)
    if block >= 0:
        start = tl.load(offsets + sequence)
        length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
        targets = 0
        if HAS_TARGETS:
            targets = tl.load(num_targets + sequence).to(tl.int32)
        forward_rows(
            q + start * stride_qt + head * stride_qh, k + start * stride_kt + head * stride_kh,
            v + start * stride_vt + head * stride_vh, out + start * stride_ot + head * stride_oh,
            position, time_weight, query_time + start, key_time + start, edges,
            stride_qt, stride_kt, stride_vt, stride_ot,
            block * BM, length, targets, alpha, inverse_divisor, context, window, full, buckets,
            QK, V, CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, HAS_POSITION, HAS_TIME, PRECISION,
            BM, BN, BLOCK_QK, BLOCK_V, BLOCK_BUCKETS,
        )  # fmt: skip
