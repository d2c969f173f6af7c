"""Sampled softmax with its own negatives a token: no vectors gathered to memory, forward or backward.

A program a token reads the vectors of its negatives where they lie. The gradient of `rows` is a segmented sum over
the (token, candidate) entries of a chunk of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_rec.kernels.triton.launch import block_of, packed, rows_of, warps_of
from npu_rec.kernels.triton.sampled_softmax_tile import add_logits, loss_and_logsumexp
from npu_rec.kernels.triton.segment_sum import add_segments, splits_for

ENTRIES_AT_ONCE = 1 << 20  # of a chunk; 33 bytes each, and what the sort needs


@triton.jit
def load_row(base, row, stride, width, BLOCK: tl.constexpr):
    """Row `[BLOCK]` float32, zero beyond `width`."""
    columns = tl.arange(0, BLOCK)
    return tl.load(base + row.to(tl.int64) * stride + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def load_negatives(
    query, rows, negatives, log_q, positive, first, count, stride, width, temperature,
    MASK_COLLISIONS: tl.constexpr, BLOCK_NEGATIVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Vectors `[BLOCK_NEGATIVES, BLOCK]` and logits of the negatives from `first` on; -inf where one does not count."""
    columns = tl.arange(0, BLOCK)[None, :]
    places = first + tl.arange(0, BLOCK_NEGATIVES)
    inside = places < count
    index = tl.load(negatives + places, mask=inside, other=0).to(tl.int64)
    at = index[:, None] * stride + columns
    vectors = tl.load(rows + at, mask=inside[:, None] & (columns < width), other=0.0).to(tl.float32)
    logits = tl.sum(vectors * query[None, :], 1) / temperature
    if log_q is not None:
        logits = logits - tl.load(log_q + index, mask=inside, other=0.0).to(tl.float32)
    if MASK_COLLISIONS:
        inside = inside & (index != positive)
    return vectors, tl.where(inside, logits, float("-inf"))


@triton.jit
def forward_kernel(
    queries, rows, positives, negatives, log_q, loss, logsumexp, stride_queries, stride_rows, count, width, temperature,
    MASK_COLLISIONS: tl.constexpr, BLOCK_NEGATIVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    query = load_row(queries, token, stride_queries, width, BLOCK)
    positive = tl.load(positives + token)
    logit = tl.sum(query * load_row(rows, positive, stride_rows, width, BLOCK), 0) / temperature
    if log_q is not None:
        logit = logit - tl.load(log_q + positive).to(tl.float32)
    # the running maxima start at a finite logit, so that no lane ever meets -inf - -inf
    largest = tl.full([BLOCK_NEGATIVES], logit, tl.float32)
    total = tl.full([BLOCK_NEGATIVES], 0.0, tl.float32)
    for first in range(0, count, BLOCK_NEGATIVES):
        _, logits = load_negatives(
            query, rows, negatives + token.to(tl.int64) * count, log_q, positive, first, count, stride_rows, width,
            temperature, MASK_COLLISIONS, BLOCK_NEGATIVES, BLOCK,
        )  # fmt: skip
        largest, total = add_logits(largest, total, logits)
    token_loss, token_logsumexp = loss_and_logsumexp(largest, total, logit)
    tl.store(loss + token, token_loss)
    tl.store(logsumexp + token, token_logsumexp)


@triton.jit
def backward_kernel(
    grad, logsumexp, queries, rows, positives, negatives, log_q, d_queries, d_logits,
    stride_queries, stride_rows, count, width, temperature,
    MASK_COLLISIONS: tl.constexpr, BLOCK_NEGATIVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`d_queries`, and `d_logits [t, 1 + count]`: the gradients of query times row, the positive's first."""
    token = tl.program_id(0)
    query = load_row(queries, token, stride_queries, width, BLOCK)
    positive = tl.load(positives + token)
    scale = tl.load(grad + token).to(tl.float32) / temperature
    normaliser = tl.load(logsumexp + token)
    at = d_logits + token.to(tl.int64) * (count + 1)
    d_query = tl.full([BLOCK_NEGATIVES, BLOCK], 0.0, tl.float32)
    others = tl.full([BLOCK_NEGATIVES], 0.0, tl.float32)
    for first in range(0, count, BLOCK_NEGATIVES):
        vectors, logits = load_negatives(
            query, rows, negatives + token.to(tl.int64) * count, log_q, positive, first, count, stride_rows, width,
            temperature, MASK_COLLISIONS, BLOCK_NEGATIVES, BLOCK,
        )  # fmt: skip
        d_logit = tl.exp(logits - normaliser) * scale
        places = first + tl.arange(0, BLOCK_NEGATIVES)
        tl.store(at + 1 + places, d_logit, mask=places < count)
        d_query += d_logit[:, None] * vectors
        others += d_logit
    # its probability minus 1, without the cancellation, and exactly zero when no negative counts
    d_positive = -tl.sum(others, 0)
    tl.store(at, d_positive)
    result = tl.sum(d_query, 0) + d_positive * load_row(rows, positive, stride_rows, width, BLOCK)
    columns = tl.arange(0, BLOCK)
    out = d_queries + token.to(tl.int64) * width + columns
    tl.store(out, result.to(d_queries.dtype.element_ty), mask=columns < width)


def _shapes(count: int, width: int) -> dict[str, int]:
    block = block_of(width)
    negatives = rows_of(block, min(block_of(count), 64))
    return {"BLOCK_NEGATIVES": negatives, "BLOCK": block, "num_warps": warps_of(negatives * block)}


def forward(
    queries: Tensor, rows: Tensor, positives: Tensor, negatives: Tensor, log_q: Tensor | None,
    temperature: float, mask_collisions: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss `[T]`, logsumexp `[T]`), float32."""
    queries, rows = packed(queries), packed(rows)
    (total, width), count = queries.shape, negatives.shape[1]
    loss = torch.empty(total, dtype=torch.float32, device=queries.device)
    logsumexp = torch.empty_like(loss)
    if total:
        forward_kernel[(total,)](
            queries, rows, positives.contiguous(), negatives.contiguous(),
            None if log_q is None else log_q.contiguous(), loss, logsumexp, queries.stride(0), rows.stride(0),
            count, width, temperature, MASK_COLLISIONS=mask_collisions, **_shapes(count, width),
        )  # fmt: skip
    return loss, logsumexp


def backward(
    grad: Tensor, logsumexp: Tensor, queries: Tensor, rows: Tensor, positives: Tensor, negatives: Tensor,
    log_q: Tensor | None, temperature: float, mask_collisions: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries and rows, in their dtypes."""
    queries, rows, grad = packed(queries), packed(rows), grad.contiguous()
    positives, negatives = positives.contiguous(), negatives.contiguous()
    (total, width), count = queries.shape, negatives.shape[1]
    d_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if not total:
        return d_queries, torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    step = min(total, max(1, ENTRIES_AT_ONCE // (count + 1)))
    splits = splits_for(step * (count + 1), rows.shape[0])
    d_rows = torch.zeros(splits, *rows.shape, dtype=torch.float32, device=rows.device)
    for start in range(0, total, step):
        chunk = slice(start, start + step)
        some = queries[chunk]
        d_logits = torch.empty(some.shape[0], count + 1, dtype=torch.float32, device=queries.device)
        backward_kernel[(some.shape[0],)](
            grad[chunk], logsumexp[chunk], some, rows, positives[chunk], negatives[chunk],
            None if log_q is None else log_q.contiguous(), d_queries[chunk], d_logits, queries.stride(0),
            rows.stride(0), count, width, temperature, MASK_COLLISIONS=mask_collisions, **_shapes(count, width),
        )  # fmt: skip
        candidates = torch.cat([positives[chunk].unsqueeze(1), negatives[chunk]], 1)
        add_segments(d_rows, some, candidates.flatten(), d_logits.flatten())
    return d_queries, (d_rows.sum(0) if splits > 1 else d_rows[0]).to(rows.dtype)
