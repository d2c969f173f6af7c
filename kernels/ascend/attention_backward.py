"""HSTU attention on Ascend, backward, from q, k and v alone: scores are computed again, by rows and by columns.

`query_kernel` gives dq and both bias gradients, `key_kernel` gives dk and dv. A program owns its partial tables.
"""

import triton
import triton.language as tl

from npu_rec.kernels.ascend.attention_tile import (
    bucket_of,
    bucket_range,
    diagonal_sums,
    gathered,
    merged,
    place_of,
    sums_beyond,
    sums_beyond_unsorted,
    window_index,
)
from npu_rec.kernels.triton.attention_ranges import key_ranges, query_ranges
from npu_rec.kernels.triton.attention_tile import allowed, ids_of, product, silu_gradient


@triton.jit
def query_rows(
    grad, q, k, v, dq, position, times, query_time, key_time, reach, triangle,
    d_position, stride_grad, stride_q, stride_k, stride_v, stride_dq,
    query_begin, length, targets, alpha, inverse_divisor, context, window, full, buckets, beyond,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr,
    BUCKETS: tl.constexpr, SORTED: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Rows `query_begin`..+BM of dq; adds to `d_position` (at distance 0), returns `beyond [BUCKETS]` with its share.

    `triangle [BN, 2 * BN]`: ones right of the diagonal. A product with it sums the first keys of a row. MERGED: ids may
    be shared.
    """
    PLAIN: tl.constexpr = CAUSAL and not ((HAS_TARGETS or HAS_CONTEXT) or HAS_WINDOW)
    shift = tl.maximum(context - 1, 0)
    history, limit = length - targets, length - targets - shift
    query = query_begin + tl.arange(0, BM)
    query_id = ids_of(query, shift, limit, HAS_TARGETS)
    query_first = ids_of(query_begin, shift, limit, HAS_TARGETS)
    query_last = ids_of(query_begin + BM - 1, shift, limit, HAS_TARGETS)
    at_qk, at_v = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    q_mask = (query < length)[:, None] & (at_qk < QK)[None, :]
    q_tile = tl.load(q + query[:, None] * stride_q + at_qk[None, :], mask=q_mask, other=0.0)
    grad_tile = tl.load(
        grad + query[:, None] * stride_grad + at_v[None, :], mask=(query < length)[:, None] & (at_v < V)[None, :],
        other=0.0,
    )  # fmt: skip
    query_seconds = query
    reached = query
    if HAS_TIME:
        query_seconds = tl.load(query_time + query, mask=query < length, other=0)
    if SORTED:
        at_bucket = tl.arange(0, BUCKETS)
        reached = tl.load(
            reach + query[:, None] * buckets + at_bucket[None, :],
            mask=(query < length)[:, None] & (at_bucket < buckets)[None, :], other=0,
        )  # fmt: skip
    at_key, at_count = tl.arange(0, BN), tl.arange(0, 2 * BN)
    ones = tl.load(triangle + at_key[:, None] * (2 * BN) + at_count[None, :])
    begin, end, diagonal_end = key_ranges(
        query_begin, length, history, shift, limit, context, window, full,
        CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, BM, BN,
    )  # fmt: skip
    diagonal = query_begin // BN * BN
    before = tl.cdiv(tl.maximum(tl.minimum(end, diagonal) - begin, 0), BN)
    tiles = before + tl.cdiv(diagonal_end - diagonal, BN)
    result = tl.zeros([BM, BLOCK_QK], dtype=tl.float32)
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
        v_tile = tl.load(
            v + key[:, None] * stride_v + at_v[None, :], mask=(key < length)[:, None] & (at_v < V)[None, :], other=0.0
        )
        score = product(q_tile, tl.trans(k_tile), PRECISION) * alpha
        if HAS_POSITION:
            near = tl.load(position + (key_first - query_last) + tl.arange(0, WINDOW))
            index = window_index(query_id[:, None], key_id[None, :], query_last, key_first)
            score += gathered(near, index, BM, BN)
        key_seconds, place = key, query
        if HAS_TIME:
            key_seconds = tl.load(key_time + key, mask=key < length, other=0)
            place = place_of(query_seconds[:, None], key_seconds[None, :])
            score += gathered(times, bucket_of(place, buckets), BM, BN)
        mask = allowed(
            query.to(tl.float32)[:, None], key.to(tl.float32)[None, :], query_id.to(tl.float32)[:, None],
            key_id.to(tl.float32)[None, :], length, limit, context, window, full,
            CAUSAL, PLAIN, HAS_CONTEXT, HAS_WINDOW,
        )  # fmt: skip
        d_score = product(grad_tile, tl.trans(v_tile), PRECISION) * silu_gradient(score, tl.sigmoid(score))
        # behind the end grad is 0, but 0 times infinity is not
        d_score = tl.where(mask & (query.to(tl.float32) < length)[:, None], d_score, 0.0)
        result += product(d_score.to(k_tile.dtype), k_tile, PRECISION)
        first_keys = d_score
        if SORTED or MERGED:
            first_keys = tl.dot(d_score, ones, input_precision="ieee")
        total = 0.0
        if HAS_POSITION:
            of_ids = d_score
            if MERGED:
                of_ids = merged(
                    first_keys, query_id, query_first, key_first, key_begin, shift, limit, HAS_TARGETS, BM, BN
                )
            straight, wrapped = diagonal_sums(of_ids * inverse_divisor, BM, BN)
            entry = d_position + (key_first - query_first) + tl.arange(0, BN)
            tl.atomic_add(entry, straight)
            tl.atomic_add(entry - BN, wrapped)
            total = tl.sum(straight) + tl.sum(wrapped)
        if SORTED:
            beyond += sums_beyond(first_keys, reached, key_begin, BM, BN, BUCKETS) * inverse_divisor
        elif HAS_TIME:
            first, last = bucket_range(query_seconds, key_seconds, query < length, key < length, buckets)
            beyond += sums_beyond_unsorted(d_score * inverse_divisor, total, place, first, last, BUCKETS)
    tl.store(
        dq + query[:, None] * stride_dq + at_qk[None, :],
        (result * (alpha * inverse_divisor)).to(dq.dtype.element_ty), mask=q_mask,
    )  # fmt: skip
    return beyond


@triton.jit
def query_kernel(
    grad, q, k, v, dq, offsets, work, num_targets, position, time_weight, query_time, key_time, reach, triangle,
    d_position, d_time, position_entries,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    items, heads, origin, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr, BUCKETS: tl.constexpr, SORTED: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Items of `work` times heads in turn; `d_position [programs, position_entries]`, `d_time [programs, BUCKETS]`."""
    at = tl.arange(0, BLOCK_BUCKETS)
    times = tl.zeros([BLOCK_BUCKETS], dtype=tl.float32)
    if HAS_TIME:
        times = tl.load(time_weight + at, mask=at <= buckets, other=0.0)
    beyond = tl.zeros([BUCKETS], dtype=tl.float32)
    for program in range(tl.program_id(0), items * heads, tl.num_programs(0)):
        item, head = program // heads, (program % heads).to(tl.int64)
        sequence, block = tl.load(work + 2 * item), tl.load(work + 2 * item + 1)
        if block >= 0:
            start = tl.load(offsets + sequence)
            length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
            targets = 0
            if HAS_TARGETS:
                targets = tl.load(num_targets + sequence).to(tl.int32)
            beyond = query_rows(
                grad + start * stride_gt + head * stride_gh, q + start * stride_qt + head * stride_qh,
                k + start * stride_kt + head * stride_kh, v + start * stride_vt + head * stride_vh,
                dq + start * stride_dt + head * stride_dh,
                position + origin, times, query_time + start, key_time + start, reach + start * buckets, triangle,
                d_position + tl.program_id(0) * position_entries + origin,
                stride_gt, stride_qt, stride_kt, stride_vt, stride_dt,
                block * BM, length, targets, alpha, inverse_divisor, context, window, full, buckets, beyond,
                QK, V, CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, HAS_POSITION, HAS_TIME, PRECISION,
                BM, BN, BLOCK_QK, BLOCK_V, WINDOW, BUCKETS, SORTED, MERGED,
            )  # fmt: skip
    if HAS_TIME:
        tl.store(d_time + tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS), beyond)


@triton.jit
def key_rows(
    grad, q, k, v, dk, dv, position, times, query_time, key_time,
    stride_grad, stride_q, stride_k, stride_v, stride_dk, stride_dv,
    key_begin, length, targets, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Rows `key_begin`..+BN of dk and dv; tiles are transposed, `[BN keys, BM queries]`."""
    PLAIN: tl.constexpr = CAUSAL and not ((HAS_TARGETS or HAS_CONTEXT) or HAS_WINDOW)
    shift = tl.maximum(context - 1, 0)
    history, limit = length - targets, length - targets - shift
    key = key_begin + tl.arange(0, BN)
    key_id = ids_of(key, shift, limit, HAS_TARGETS)
    key_first = ids_of(key_begin, shift, limit, HAS_TARGETS)
    at_qk, at_v = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    k_mask, v_mask = (key < length)[:, None] & (at_qk < QK)[None, :], (key < length)[:, None] & (at_v < V)[None, :]
    k_tile = tl.load(k + key[:, None] * stride_k + at_qk[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + key[:, None] * stride_v + at_v[None, :], mask=v_mask, other=0.0)
    key_seconds = key
    if HAS_TIME:
        key_seconds = tl.load(key_time + key, mask=key < length, other=0)
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
        query_id = ids_of(query, shift, limit, HAS_TARGETS)
        query_last = ids_of(query_begin + BM - 1, shift, limit, HAS_TARGETS)
        q_tile = tl.load(
            q + query[:, None] * stride_q + at_qk[None, :],
            mask=(query < length)[:, None] & (at_qk < QK)[None, :], other=0.0,
        )  # fmt: skip
        grad_tile = tl.load(
            grad + query[:, None] * stride_grad + at_v[None, :],
            mask=(query < length)[:, None] & (at_v < V)[None, :], other=0.0,
        )  # fmt: skip
        score = product(k_tile, tl.trans(q_tile), PRECISION) * alpha
        if HAS_POSITION:
            near = tl.load(position + (key_first - query_last) + tl.arange(0, WINDOW))
            index = window_index(query_id[None, :], key_id[:, None], query_last, key_first)
            score += gathered(near, index, BN, BM)
        if HAS_TIME:
            query_seconds = tl.load(query_time + query, mask=query < length, other=0)
            score += gathered(times, bucket_of(place_of(query_seconds[None, :], key_seconds[:, None]), buckets), BN, BM)
        mask = allowed(
            query.to(tl.float32)[None, :], key.to(tl.float32)[:, None], query_id.to(tl.float32)[None, :],
            key_id.to(tl.float32)[:, None], length, limit, context, window, full,
            CAUSAL, PLAIN, HAS_CONTEXT, HAS_WINDOW,
        )  # fmt: skip
        sigmoid = tl.sigmoid(score)
        attended = tl.where(mask, score * sigmoid, 0.0)
        dv_tile += product(attended.to(grad_tile.dtype), grad_tile, PRECISION)
        d_score = product(v_tile, tl.trans(grad_tile), PRECISION) * silu_gradient(score, sigmoid)
        d_score = tl.where(mask, d_score, 0.0)
        dk_tile += product(d_score.to(q_tile.dtype), q_tile, PRECISION)
    tl.store(
        dk + key[:, None] * stride_dk + at_qk[None, :], (dk_tile * (alpha * inverse_divisor)).to(dk.dtype.element_ty),
        mask=k_mask,
    )  # fmt: skip
    tl.store(
        dv + key[:, None] * stride_dv + at_v[None, :], (dv_tile * inverse_divisor).to(dv.dtype.element_ty), mask=v_mask
    )


@triton.jit
def key_kernel(
    grad, q, k, v, dk, dv, offsets, work, num_targets, position, time_weight, query_time, key_time,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    items, heads, origin, alpha, inverse_divisor, context, window, full, buckets,
    QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """Items of `work` times heads, dealt out to the programs in turn."""
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
            key_rows(
                grad + start * stride_gt + head * stride_gh, q + start * stride_qt + head * stride_qh,
                k + start * stride_kt + head * stride_kh, v + start * stride_vt + head * stride_vh,
                dk + start * stride_dkt + head * stride_dkh, dv + start * stride_dvt + head * stride_dvh,
                position + origin, times, query_time + start, key_time + start,
                stride_gt, stride_qt, stride_kt, stride_vt, stride_dkt, stride_dvt,
                block * BN, length, targets, alpha, inverse_divisor, context, window, full, buckets,
                QK, V, CAUSAL, HAS_TARGETS, HAS_CONTEXT, HAS_WINDOW, HAS_POSITION, HAS_TIME, PRECISION,
                BM, BN, BLOCK_QK, BLOCK_V, WINDOW,
            )  # fmt: skip
