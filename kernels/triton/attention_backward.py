"""HSTU attention, backward, from q, k and v alone: scores are computed again, once by rows and once by columns.

`query_kernel` gives dq and both bias gradients, BM = BN rows a program; `key_kernel` gives dk and dv. No atomics on
dq, so the same inputs give the same bits.
"""

import triton
import triton.language as tl

from npu_rec.kernels.triton.attention_ranges import key_ranges, query_ranges
from npu_rec.kernels.triton.attention_tile import (
    allowed,
    bucket_range,
    ids_of,
    position_gradient,
    product,
    scores,
    silu_gradient,
    time_gradient,
)


@triton.jit
def query_rows(
    grad, q, k, v, dq, position, time_weight, query_time, key_time, edges, d_position, d_time,
    stride_grad, stride_q, stride_k, stride_v, stride_dq,
    query_begin, length, targets, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """Rows `query_begin`..+BM of dq; adds to `d_position` (at distance 0) and writes `d_time [buckets + 1]`."""
    PLAIN: tl.constexpr = CAUSAL and not ((HAS_TARGETS or HAS_CONTEXT) or HAS_WINDOW)  # Triton 3.2 takes two at a time
    shift = tl.maximum(context - 1, 0)
    history, limit = length - targets, length - targets - shift
    query = query_begin + tl.arange(0, BM)
    query_inside = tl.minimum(query, length - 1)
    query_id = ids_of(query_inside, shift, limit, HAS_TARGETS)[:, None]
    at_qk, at_v = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    q_mask = (query < length)[:, None] & (at_qk < QK)[None, :]
    q_tile = tl.load(q + query[:, None].to(tl.int64) * stride_q + at_qk[None, :], mask=q_mask, other=0.0)
    grad_tile = tl.load(
        grad + query[:, None].to(tl.int64) * stride_grad + at_v[None, :],
        mask=(query < length)[:, None] & (at_v < V)[None, :], other=0.0,
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
    result = tl.zeros([BM, BLOCK_QK], dtype=tl.float32)
    of_buckets = tl.zeros([BLOCK_BUCKETS], dtype=tl.float32)
    for tile in range(0, tiles):
        key_begin = tl.where(tile < before, begin + tile * BN, query_begin + (tile - before) * BN)
        key = key_begin + tl.arange(0, BN)
        key_inside = tl.minimum(key, length - 1)
        key_id = ids_of(key_inside, shift, limit, HAS_TARGETS)[None, :]
        k_tile = tl.load(
            k + key[:, None].to(tl.int64) * stride_k + at_qk[None, :],
            mask=(key < length)[:, None] & (at_qk < QK)[None, :], other=0.0,
        )  # fmt: skip
        v_tile = tl.load(
            v + key[None, :].to(tl.int64) * stride_v + at_v[:, None],
            mask=(key < length)[None, :] & (at_v < V)[:, None], other=0.0,
        )  # fmt: skip
        first, last, key_seconds = 0, 0, key_inside
        if HAS_TIME:
            key_seconds = tl.load(key_time + key_inside)
            first, last = bucket_range(query_seconds, key_seconds, edges, buckets, BLOCK_BUCKETS)
        score = scores(
            q_tile, tl.trans(k_tile), query_id, key_id, query_seconds[:, None], key_seconds[None, :], first, last,
            alpha, position, time_weight, edges, HAS_POSITION, HAS_TIME, PRECISION,
        )  # fmt: skip
        mask = allowed(
            query[:, None], key[None, :], query_id, key_id, length, limit, context, window, full,
            CAUSAL, PLAIN, HAS_CONTEXT, HAS_WINDOW,
        )  # fmt: skip
        d_score = product(grad_tile, v_tile, PRECISION) * silu_gradient(score, tl.sigmoid(score))
        # behind the end grad is 0, but 0 times infinity is not
        d_score = tl.where(mask & (query < length)[:, None], d_score, 0.0)
        result += product(d_score.to(k_tile.dtype), k_tile, PRECISION)
        if HAS_POSITION:
            position_gradient(
                d_position, d_score, query_begin, key_begin, length, shift, limit, inverse_divisor,
                PLAIN, HAS_TARGETS, BM, BN,
            )  # fmt: skip
        if HAS_TIME:
            seconds = tl.abs(query_seconds[:, None] - key_seconds[None, :])
            of_buckets = time_gradient(of_buckets, d_score, seconds, first, last, edges, BLOCK_BUCKETS)
    tl.store(
        dq + query[:, None].to(tl.int64) * stride_dq + at_qk[None, :],
        (result * (alpha * inverse_divisor)).to(dq.dtype.element_ty), mask=q_mask,
    )  # fmt: skip
    if HAS_TIME:
        index = tl.arange(0, BLOCK_BUCKETS)
        tl.store(d_time + index, of_buckets * inverse_divisor, mask=index <= buckets)


@triton.jit
def query_kernel(
    grad, q, k, v, dq, offsets, work, num_targets, position, time_weight, query_time, key_time, edges,
    d_position, d_time, position_entries,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    heads, origin, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """One item of `work` and one head a program; `d_time [programs, buckets + 1]`, `d_position [programs, entries]`."""
    program = tl.program_id(0)
    item, head = program // heads, (program % heads).to(tl.int64)
    sequence, block = tl.load(work + 2 * item), tl.load(work + 2 * item + 1)
    if block >= 0:
        start = tl.load(offsets + sequence)
        length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
        targets = 0
        if HAS_TARGETS:
            targets = tl.load(num_targets + sequence).to(tl.int32)
        query_rows(
            grad + start * stride_gt + head * stride_gh, q + start * stride_qt + head * stride_qh,
            k + start * stride_kt + head * stride_kh, v + start * stride_vt + head * stride_vh,
            dq + start * stride_dt + head * stride_dh,
            position, time_weight, query_time + start, key_time + start, edges,
            d_position + program.to(tl.int64) * position_entries + origin,
            d_time + program.to(tl.int64) * (buckets + 1),
            stride_gt, stride_qt, stride_kt, stride_vt, stride_dt,
            block * BM, length, targets, alpha, inverse_divisor, context, window, full, buckets,
            QK, V, CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, HAS_POSITION, HAS_TIME, PRECISION,
            BM, BN, BLOCK_QK, BLOCK_V, BLOCK_BUCKETS,
        )  # fmt: skip


@triton.jit
def key_rows(
    grad, q, k, v, dk, dv, position, time_weight, query_time, key_time, edges,
    stride_grad, stride_q, stride_k, stride_v, stride_dk, stride_dv,
    key_begin, length, targets, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """Rows `key_begin`..+BN of dk and dv; tiles are transposed, `[BN keys, BM queries]`."""
    PLAIN: tl.constexpr = CAUSAL and not ((HAS_TARGETS or HAS_CONTEXT) or HAS_WINDOW)  # Triton 3.2 takes two at a time
    shift = tl.maximum(context - 1, 0)
    history, limit = length - targets, length - targets - shift
    key = key_begin + tl.arange(0, BN)
    key_inside = tl.minimum(key, length - 1)
    key_id = ids_of(key_inside, shift, limit, HAS_TARGETS)[:, None]
    at_qk, at_v = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    k_mask, v_mask = (key < length)[:, None] & (at_qk < QK)[None, :], (key < length)[:, None] & (at_v < V)[None, :]
    k_tile = tl.load(k + key[:, None].to(tl.int64) * stride_k + at_qk[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + key[:, None].to(tl.int64) * stride_v + at_v[None, :], mask=v_mask, other=0.0)
    key_seconds = key_inside
    if HAS_TIME:
        key_seconds = tl.load(key_time + key_inside)
    context_end, begin, end, tail = query_ranges(
        key_begin, length, history, shift, context, window, full,
        CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, BM, BN,
    )  # fmt: skip
    of_context = context_end // BM
    to_tail = of_context + tl.cdiv(tl.maximum(end - begin, 0), BM)
    tiles = to_tail + tl.cdiv(tl.maximum(length - tail, 0), BM)
    dk_tile = tl.zeros([BN, BLOCK_QK], dtype=tl.float32)
    dv_tile = tl.zeros([BN, BLOCK_V], dtype=tl.float32)
    for tile in range(0, tiles):
        query_begin = tl.where(tile < to_tail, begin + (tile - of_context) * BM, tail + (tile - to_tail) * BM)
        query_begin = tl.where(tile < of_context, tile * BM, query_begin)
        query = query_begin + tl.arange(0, BM)
        query_inside = tl.minimum(query, length - 1)
        query_id = ids_of(query_inside, shift, limit, HAS_TARGETS)[None, :]
        q_tile = tl.load(
            q + query[:, None].to(tl.int64) * stride_q + at_qk[None, :],
            mask=(query < length)[:, None] & (at_qk < QK)[None, :], other=0.0,
        )  # fmt: skip
        grad_tile = tl.load(
            grad + query[:, None].to(tl.int64) * stride_grad + at_v[None, :],
            mask=(query < length)[:, None] & (at_v < V)[None, :], other=0.0,
        )  # fmt: skip
        first, last, query_seconds = 0, 0, query_inside
        if HAS_TIME:
            query_seconds = tl.load(query_time + query_inside)
            first, last = bucket_range(query_seconds, key_seconds, edges, buckets, BLOCK_BUCKETS)
        score = scores(
            k_tile, tl.trans(q_tile), query_id, key_id, query_seconds[None, :], key_seconds[:, None], first, last,
            alpha, position, time_weight, edges, HAS_POSITION, HAS_TIME, PRECISION,
        )  # fmt: skip
        mask = allowed(
            query[None, :], key[:, None], query_id, key_id, length, limit, context, window, full,
            CAUSAL, PLAIN, HAS_CONTEXT, HAS_WINDOW,
        )  # fmt: skip
        sigmoid = tl.sigmoid(score)
        attended = tl.where(mask, score * sigmoid, 0.0)
        dv_tile += product(attended.to(grad_tile.dtype), grad_tile, PRECISION)
        d_score = product(v_tile, tl.trans(grad_tile), PRECISION) * silu_gradient(score, sigmoid)
        d_score = tl.where(mask, d_score, 0.0)
        dk_tile += product(d_score.to(q_tile.dtype), q_tile, PRECISION)
    tl.store(
        dk + key[:, None].to(tl.int64) * stride_dk + at_qk[None, :],
        (dk_tile * (alpha * inverse_divisor)).to(dk.dtype.element_ty), mask=k_mask,
    )  # fmt: skip
    tl.store(
        dv + key[:, None].to(tl.int64) * stride_dv + at_v[None, :],
        (dv_tile * inverse_divisor).to(dv.dtype.element_ty), mask=v_mask,
    )  # fmt: skip


@triton.jit
def key_kernel(
    grad, q, k, v, dk, dv, offsets, work, num_targets, position, time_weight, query_time, key_time, edges,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    heads, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """One item of `work` and one head a program."""
    item, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    sequence, block = tl.load(work + 2 * item), tl.load(work + 2 * item + 1)
    if block >= 0:
        start = tl.load(offsets + sequence)
        length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
        targets = 0
        if HAS_TARGETS:
            targets = tl.load(num_targets + sequence).to(tl.int32)
        key_rows(
            grad + start * stride_gt + head * stride_gh, q + start * stride_qt + head * stride_qh,
            k + start * stride_kt + head * stride_kh, v + start * stride_vt + head * stride_vh,
            dk + start * stride_dkt + head * stride_dkh, dv + start * stride_dvt + head * stride_dvh,
            position, time_weight, query_time + start, key_time + start, edges,
            stride_gt, stride_qt, stride_kt, stride_vt, stride_dkt, stride_dvt,
            block * BN, length, targets, alpha, inverse_divisor, context, window, full, buckets,
            QK, V, CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, HAS_POSITION, HAS_TIME, PRECISION,
            BM, BN, BLOCK_QK, BLOCK_V, BLOCK_BUCKETS,
        )  # fmt: skip
