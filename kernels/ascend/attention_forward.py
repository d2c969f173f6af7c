"""HSTU attention on Ascend, forward: one program a cube core, which takes one item of work after the other."""

import triton
import triton.language as tl

from npu_rec.kernels.ascend.attention_tile import bucket_of, gathered, place_of, window_index
from npu_rec.kernels.triton.attention_ranges import key_ranges
from npu_rec.kernels.triton.attention_tile import allowed, ids_of, product


@triton.jit
def forward_rows(
    q, k, v, out, position, times, query_time, key_time,
    stride_q, stride_k, stride_v, stride_out,
    query_begin, length, targets, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Rows `query_begin`..+BM of `out`; the pointers stand at token 0 of the sequence and at the head.

    `times [BLOCK_BUCKETS]` is the time table itself.
    """
    PLAIN: tl.constexpr = CAUSAL and not ((HAS_TARGETS or HAS_CONTEXT) or HAS_WINDOW)
    shift = tl.maximum(context - 1, 0)
    history, limit = length - targets, length - targets - shift
    query = query_begin + tl.arange(0, BM)
    query_id = ids_of(query, shift, limit, HAS_TARGETS)
    query_last = ids_of(query_begin + BM - 1, shift, limit, HAS_TARGETS)
    at_qk, at_v = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    q_tile = tl.load(
        q + query[:, None] * stride_q + at_qk[None, :],
        mask=(query < length)[:, None] & (at_qk < QK)[None, :],
        other=0.0,
    )
    query_seconds = query
    if HAS_TIME:
        query_seconds = tl.load(query_time + query, mask=query < length, other=0)
    begin, end, diagonal_end = key_ranges(
        query_begin, length, history, shift, limit, context, window, full,
        CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, BM, BN,
    )  # fmt: skip
    diagonal = query_begin // BN * BN
    before = tl.cdiv(tl.maximum(tl.minimum(end, diagonal) - begin, 0), BN)
    tiles = before + tl.cdiv(diagonal_end - diagonal, BN)
    result = tl.zeros([BM, BLOCK_V], dtype=tl.float32)
    for tile in range(0, tiles):
        key_begin = tl.where(tile < before, begin + tile * BN, diagonal + (tile - before) * BN)
        key = key_begin + tl.arange(0, BN)
        key_id = ids_of(key, shift, limit, HAS_TARGETS)
        key_first = ids_of(key_begin, shift, limit, HAS_TARGETS)
        k_tile = tl.load(
            k + key[:, None] * stride_k + at_qk[None, :],
            mask=(key < length)[:, None] & (at_qk < QK)[None, :],
            other=0.0,
        )
        score = product(q_tile, tl.trans(k_tile), PRECISION) * alpha
        if HAS_POSITION:
            near = tl.load(position + (key_first - query_last) + tl.arange(0, WINDOW))
            index = window_index(query_id[:, None], key_id[None, :], query_last, key_first)
            score += gathered(near, index, BM, BN)
        if HAS_TIME:
            key_seconds = tl.load(key_time + key, mask=key < length, other=0)
            score += gathered(times, bucket_of(place_of(query_seconds[:, None], key_seconds[None, :]), buckets), BM, BN)
        mask = allowed(
            query.to(tl.float32)[:, None], key.to(tl.float32)[None, :], query_id.to(tl.float32)[:, None],
            key_id.to(tl.float32)[None, :], length, limit, context, window, full,
            CAUSAL, PLAIN, HAS_CONTEXT, HAS_WINDOW,
        )  # fmt: skip
        attended = tl.where(mask, score * tl.sigmoid(score), 0.0)
        v_tile = tl.load(
            v + key[:, None] * stride_v + at_v[None, :], mask=(key < length)[:, None] & (at_v < V)[None, :], other=0.0
        )
        result += product(attended.to(v_tile.dtype), v_tile, PRECISION)
    tl.store(
        out + query[:, None] * stride_out + at_v[None, :], (result * inverse_divisor).to(out.dtype.element_ty),
        mask=(query < length)[:, None] & (at_v < V)[None, :],
    )  # fmt: skip


@triton.jit
def forward_kernel(
    q, k, v, out, offsets, work, num_targets, position, time_weight, query_time, key_time,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    items, heads, origin, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """Items of `work` (kernels/triton/schedule.py) times heads, dealt out to the programs in turn."""
    at = tl.arange(0, BLOCK_BUCKETS)
    times = tl.zeros([BLOCK_BUCKETS], dtype=tl.float32)
    if HAS_TIME:
        times = tl.load(time_weight + at, mask=at <= buckets, other=0.0)
    for program in range(tl.program_id(0), items * heads, tl.num_programs(0)):
        item, head = program // heads, (program % heads).to(tl.int64)
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
                position + origin, times, query_time + start, key_time + start,
                stride_qt, stride_kt, stride_vt, stride_ot,
                block * BM, length, targets, alpha, inverse_divisor, context, window, full, buckets,
                QK, V, CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, HAS_POSITION, HAS_TIME, PRECISION,
                BM, BN, BLOCK_QK, BLOCK_V, WINDOW,
            )  # fmt: skip
