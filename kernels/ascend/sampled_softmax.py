"""Sampled softmax with its own negatives a token on Ascend: no vectors gathered to memory, forward or backward.

A program a vector core takes one token after the other and reads the vectors of its negatives where they lie. The
gradient of `rows` is a segmented sum over the (token, candidate) entries of a chunk of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_rec.kernels.ascend.segment_sum import add_segments, block_for, joined_rows, padded, rows_for
from npu_rec.kernels.triton.sampled_softmax_tile import add_logits, loss_and_logsumexp

ENTRIES_AT_ONCE = 1 << 20  # of a chunk; 37 bytes each, and what the sort needs


@triton.jit
def load_negatives(
    query, rows, negatives, log_q, positive, first, count, stride, columns, temperature,
    MASK_COLLISIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Vectors `[ROWS, BLOCK]` and logits of the negatives from `first` on; -inf where one does not count.

    `negatives`, `log_q`: those of the token.
    """
    vectors = joined_rows(rows, stride, negatives, first, count - 1, columns, ROWS).reshape([ROWS, BLOCK])
    vectors = vectors.to(tl.float32)
    logits = tl.sum(vectors * query[None, :], 1) / temperature
    places = first + tl.arange(0, ROWS)
    if log_q is not None:
        logits = logits - tl.load(log_q + places, mask=places < count, other=0.0)
    counts = places.to(tl.float32) < count
    if MASK_COLLISIONS:
        index = tl.load(negatives + places, mask=places < count, other=0).to(tl.int32)
        counts = counts & ((index - positive.to(tl.int32)).to(tl.float32) != 0.0)
    return vectors, tl.where(counts, logits, float("-inf"))


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    queries, rows, positives, negatives, positive_log_q, negative_log_q, loss, logsumexp,
    total, stride_queries, stride_rows, count, temperature,
    MASK_COLLISIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    for token in range(tl.program_id(0), total, tl.num_programs(0)):
        query = tl.load(queries + tl.cast(token, tl.int64) * stride_queries + columns).to(tl.float32)
        positive = tl.load(positives + token)
        logit = tl.sum(query * tl.load(rows + positive * stride_rows + columns).to(tl.float32), 0) / temperature
        at = tl.cast(token, tl.int64) * count
        log_q = None
        if negative_log_q is not None:
            logit = logit - tl.load(positive_log_q + token)
            log_q = negative_log_q + at
        # the running maxima start at a finite logit, so that no lane ever meets -inf - -inf
        largest = tl.full([ROWS], 0.0, tl.float32) + logit
        sums = tl.full([ROWS], 0.0, tl.float32)
        for first in range(0, count, ROWS):
            _, logits = load_negatives(
                query, rows, negatives + at, log_q, positive, first, count, stride_rows, columns, temperature,
                MASK_COLLISIONS, ROWS, BLOCK,
            )  # fmt: skip
            largest, sums = add_logits(largest, sums, logits)
        token_loss, token_logsumexp = loss_and_logsumexp(largest, sums, logit)
        tl.store(loss + token, token_loss)
        tl.store(logsumexp + token, token_logsumexp)


@triton.jit(do_not_specialize=["total"])
def backward_kernel(
    grad, logsumexp, queries, rows, positives, negatives, negative_log_q, d_queries, d_logits,
    total, stride_queries, stride_rows, count, temperature,
    MASK_COLLISIONS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`d_queries`, and `d_logits [t, 1 + count]`: the gradients of query times row, the positive's first."""
    columns = tl.arange(0, BLOCK)
    for token in range(tl.program_id(0), total, tl.num_programs(0)):
        query = tl.load(queries + tl.cast(token, tl.int64) * stride_queries + columns).to(tl.float32)
        positive = tl.load(positives + token)
        scale = tl.load(grad + token) / temperature
        normaliser = tl.load(logsumexp + token)
        at = tl.cast(token, tl.int64) * count
        at_logits = d_logits + at + token
        log_q = None
        if negative_log_q is not None:
            log_q = negative_log_q + at
        d_query = tl.full([BLOCK], 0.0, tl.float32)
        others = tl.full([ROWS], 0.0, tl.float32)
        for first in range(0, count, ROWS):
            vectors, logits = load_negatives(
                query, rows, negatives + at, log_q, positive, first, count, stride_rows, columns, temperature,
                MASK_COLLISIONS, ROWS, BLOCK,
            )  # fmt: skip
            d_logit = tl.exp(logits - normaliser) * scale
            places = first + tl.arange(0, ROWS)
            tl.store(at_logits + 1 + places, d_logit, mask=places < count)
            d_query += tl.sum(d_logit[:, None] * vectors, 0)
            others += d_logit
        # its probability minus 1, without the cancellation, and exactly zero when no negative counts
        d_positive = -tl.sum(others, 0)
        tl.store(at_logits, d_positive)
        d_query += d_positive * tl.load(rows + positive * stride_rows + columns).to(tl.float32)
        out = d_queries + tl.cast(token, tl.int64) * WIDTH + columns
        tl.store(out, d_query.to(d_queries.dtype.element_ty), mask=columns < WIDTH)


def _log_q_of(log_q: Tensor | None, index: Tensor) -> Tensor | None:
    """That of each candidate, float32, for a kernel would load them one by one."""
    return None if log_q is None else log_q.float()[index]


def forward(
    queries: Tensor, rows: Tensor, positives: Tensor, negatives: Tensor, log_q: Tensor | None,
    temperature: float, mask_collisions: bool, programs: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss `[T]`, logsumexp `[T]`), float32."""
    total, count = negatives.shape
    loss = torch.empty(total, dtype=torch.float32, device=queries.device)
    logsumexp = torch.empty_like(loss)
    block = block_for(rows.shape[1])
    queries, rows = padded(queries), padded(rows)
    if total:
        forward_kernel[(programs,)](
            queries, rows, positives.contiguous(), negatives.contiguous(), _log_q_of(log_q, positives),
            _log_q_of(log_q, negatives), loss, logsumexp, total, queries.stride(0), rows.stride(0), count, temperature,
            MASK_COLLISIONS=mask_collisions, ROWS=rows_for(block, count), BLOCK=block,
        )  # fmt: skip
    return loss, logsumexp


def backward(
    grad: Tensor, logsumexp: Tensor, queries: Tensor, rows: Tensor, positives: Tensor, negatives: Tensor,
    log_q: Tensor | None, temperature: float, mask_collisions: bool, programs: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries and rows, in their dtypes."""
    total, count = negatives.shape
    d_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    d_rows = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    width, block = rows.shape[1], block_for(rows.shape[1])
    queries, rows, grad = padded(queries), padded(rows), grad.float().contiguous()
    positives, negatives = positives.contiguous(), negatives.contiguous()
    step = max(1, ENTRIES_AT_ONCE // (count + 1))
    for start in range(0, total, step):
        chunk = slice(start, start + step)
        some = queries[chunk]
        d_logits = torch.empty(some.shape[0], count + 1, dtype=torch.float32, device=queries.device)
        backward_kernel[(programs,)](
            grad[chunk], logsumexp[chunk], some, rows, positives[chunk], negatives[chunk],
            _log_q_of(log_q, negatives[chunk]), d_queries[chunk], d_logits, some.shape[0], some.stride(0),
            rows.stride(0), count, temperature,
            MASK_COLLISIONS=mask_collisions, WIDTH=width, ROWS=rows_for(block, count), BLOCK=block,
        )  # fmt: skip
        candidates = torch.cat([positives[chunk].unsqueeze(1), negatives[chunk]], 1)
        add_segments(d_rows, some, candidates.flatten(), d_logits.flatten(), programs)
    return d_queries, d_rows.to(rows.dtype)
