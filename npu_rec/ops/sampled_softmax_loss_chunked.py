"""`sampled_softmax_loss` over chunks of tokens, in bounded memory.

With few rows (`U` up to `DENSE_RATIO` times R) a chunk's logits against all rows are one matrix
product, from which those of the negatives are picked: far cheaper than gathering R vectors a token,
which is memory traffic alone. With many rows the vectors of a chunk are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend
from npu_rec.ops.sampled_softmax_loss_request import SampledSoftmaxRequest

DENSE_RATIO = 64
FLOATS_AT_ONCE = 1 << 20  # bounds the memory of a chunk


class _Work:
    def __init__(self, request: SampledSoftmaxRequest) -> None:
        self.request = request
        self.dtype = request.compute_dtype
        self.queries, self.rows = request.queries.to(self.dtype), request.rows.to(self.dtype)
        self.log_q = None if request.log_q is None else request.log_q.to(self.dtype)
        (count, width), negatives = request.rows.shape, request.negatives.shape[1]
        self.dense = count <= DENSE_RATIO * max(negatives, 1)
        self.step = max(1, FLOATS_AT_ONCE // max(1, count if self.dense else negatives * width))

    def logits(self, start: int) -> tuple[Tensor, Tensor]:
        """Of the chunk at `start`: the positives' `[t, 1]` and the negatives' `[t, R]`."""
        request, chunk = self.request, slice(start, start + self.step)
        queries, positives, negatives = (
            self.queries[chunk],
            request.positives[chunk].unsqueeze(1),
            request.negatives[chunk],
        )
        if self.dense:
            everything = queries @ self.rows.T
            positive, negative = everything.gather(1, positives), everything.gather(1, negatives)
        else:
            positive = (queries * self.rows.index_select(0, positives.squeeze(1))).sum(1, keepdim=True)
            negative = torch.bmm(self.vectors(negatives), queries.unsqueeze(2)).squeeze(2)
        positive, negative = positive / request.temperature, negative.div_(request.temperature)
        if self.log_q is not None:
            positive, negative = positive - self.log_q[positives], negative.sub_(self.log_q[negatives])
        if request.mask_collisions:
            negative.masked_fill_(negatives == positives, float("-inf"))
        return positive, negative

    def vectors(self, index: Tensor) -> Tensor:
        """Rows `[t, R, D]`."""
        return self.rows.index_select(0, index.flatten()).view(*index.shape, self.rows.shape[1])


def forward(request: SampledSoftmaxRequest) -> tuple[Tensor, Tensor]:
    """(loss `[T]`, logsumexp `[T]`)."""
    work = _Work(request)
    total = request.queries.shape[0]
    loss = torch.empty(total, dtype=work.dtype, device=request.queries.device)
    logsumexp = torch.empty_like(loss)
    for start in range(0, total, work.step):
        positive, negative = work.logits(start)
        normaliser = (
            torch.logaddexp(negative.logsumexp(1), positive.squeeze(1)) if negative.shape[1] else positive.squeeze(1)
        )
        logsumexp[start : start + work.step] = normaliser
        loss[start : start + work.step] = normaliser - positive.squeeze(1)
    return loss, logsumexp


def backward(request: SampledSoftmaxRequest, logsumexp: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and rows."""
    work = _Work(request)
    d_queries, d_rows = torch.empty_like(work.queries), torch.zeros_like(work.rows)
    for start in range(0, request.queries.shape[0], work.step):
        chunk = slice(start, start + work.step)
        positives, negatives, queries = (
            request.positives[chunk].unsqueeze(1),
            request.negatives[chunk],
            work.queries[chunk],
        )
        positive, negative = work.logits(start)
        scale = (grad[chunk].to(work.dtype) / request.temperature).unsqueeze(1)
        normaliser = logsumexp[chunk].unsqueeze(1)
        d_positive = (positive.sub_(normaliser).exp_() - 1.0) * scale
        d_negative = negative.sub_(normaliser).exp_().mul_(scale)
        if work.dense:
            d_logits = queries.new_zeros(queries.shape[0], work.rows.shape[0])
            d_logits.scatter_add_(1, negatives, d_negative).scatter_add_(1, positives, d_positive)
            torch.mm(d_logits, work.rows, out=d_queries[chunk])
            d_rows.addmm_(d_logits.T, queries)
        else:
            d_queries[chunk] = torch.bmm(d_negative.unsqueeze(1), work.vectors(negatives)).squeeze(1)
            d_queries[chunk] += d_positive * work.rows.index_select(0, positives.squeeze(1))
            outer = d_negative.unsqueeze(2) * queries.unsqueeze(1)
            d_rows.index_add_(0, negatives.flatten(), outer.flatten(0, 1))
            d_rows.index_add_(0, positives.squeeze(1), d_positive * queries)
    return d_queries.to(request.queries.dtype), d_rows.to(request.rows.dtype)


BACKEND = Backend("chunked", forward, backward)
