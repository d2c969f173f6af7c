"""`sampled_softmax_loss`, obviously right: gathers [T, R, D], backward by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend, backward_by_autograd
from npu_rec.ops.sampled_softmax_loss_request import SampledSoftmaxRequest


def _logits(request: SampledSoftmaxRequest, queries: Tensor, rows: Tensor) -> Tensor:
    """`[T, 1 + R]`, the positive's first."""
    dtype = request.compute_dtype
    candidates = torch.cat([request.positives.unsqueeze(1), request.negatives], 1)
    logits = torch.einsum("td,trd->tr", queries.to(dtype), rows.to(dtype)[candidates]) / request.temperature
    if request.log_q is not None:
        logits = logits - request.log_q.to(dtype)[candidates]
    if request.mask_collisions:
        collides = candidates == request.positives.unsqueeze(1)
        collides[:, 0] = False
        logits = logits.masked_fill(collides, float("-inf"))
    return logits


def forward(request: SampledSoftmaxRequest) -> tuple[Tensor, Tensor]:
    """(loss `[T]`, logsumexp `[T]`)."""
    logits = _logits(request, request.queries, request.rows)
    logsumexp = logits.logsumexp(1)
    return logsumexp - logits[:, 0], logsumexp


def backward(request: SampledSoftmaxRequest, logsumexp: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of queries and rows."""

    def loss(queries: Tensor, rows: Tensor) -> Tensor:
        logits = _logits(request, queries, rows)
        return logits.logsumexp(1) - logits[:, 0]

    return backward_by_autograd(loss, grad, (request.queries, request.rows))


BACKEND = Backend("reference", forward, backward)
