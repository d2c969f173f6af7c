"""Sampled softmax with its own negatives for every position.

HSTU, arXiv 2402.17152, appendix: cosine similarity over a temperature, R negatives a position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_rec.ops import (
    sampled_softmax_loss_chunked,
    sampled_softmax_loss_cpp,
    sampled_softmax_loss_reference,
    sampled_softmax_loss_triton,
    sampled_softmax_loss_triton_ascend,
)
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.registry import operator
from npu_rec.ops.sampled_softmax_loss_request import SampledSoftmaxRequest

SAMPLED_SOFTMAX_LOSS = operator(
    "sampled_softmax_loss",
    sampled_softmax_loss_cpp.BACKEND,
    sampled_softmax_loss_triton.BACKEND,
    sampled_softmax_loss_triton_ascend.BACKEND,
    sampled_softmax_loss_chunked.BACKEND,
    sampled_softmax_loss_reference.BACKEND,
    sample=SampledSoftmaxRequest.sample,
)


def sampled_softmax_loss(
    queries: Tensor,
    rows: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    log_q: Tensor | None = None,
    mask_collisions: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of the positive against the positive and the R negatives of each token.

    Args:
        queries: `[T, D]`, float64, float32, bfloat16 or float16, already normalised by the caller.
        rows: `[U, D]`, the item vectors in play, already normalised, so no operator sees a table.
        positives: `[T]` int64 index into `rows`.
        negatives: `[T, R]` int64 index into `rows`.
        temperature: logits are divided by it; positive.
        log_q: `[U]` log of the sampling probability, subtracted from the logits of positives and
            negatives alike (logQ correction), or None.
        mask_collisions: a negative equal to the positive does not count.
        backend: `auto`, or the name of one.

    Returns:
        `[T]` loss per token, float32 (float64 for float64 queries). Differentiable in queries and rows.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or (on the CPU) an index lies outside `rows`.
    """
    check_tensors(
        floats={"queries": queries, "rows": rows, "log_q": log_q},
        indices={"positives": positives, "negatives": negatives},
        optional=("log_q",),
    )
    check_constants(temperature=(temperature, float), mask_collisions=(mask_collisions, bool), backend=(backend, str))
    if queries.dim() != 2 or rows.dim() != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries [T, D] and rows [U, D] do not fit: {list(queries.shape)}, {list(rows.shape)}")
    total = queries.shape[0]
    if positives.shape != (total,) or negatives.dim() != 2 or negatives.shape[0] != total:
        raise ValueError(
            f"positives must be [T] and negatives [T, R] with T = {total}, "
            f"got {list(positives.shape)}, {list(negatives.shape)}"
        )
    if log_q is not None and log_q.shape != rows.shape[:1]:
        raise ValueError(f"log_q must be [U] = [{rows.shape[0]}], got {list(log_q.shape)}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    loss, _ = torch.ops.npu_rec.sampled_softmax_loss(
        queries, rows, positives, negatives, log_q, temperature, mask_collisions, backend
    )
    return loss  # type: ignore[no-any-return]


@torch.library.custom_op("npu_rec::sampled_softmax_loss", mutates_args=())
def _forward(
    queries: Tensor,
    rows: Tensor,
    positives: Tensor,
    negatives: Tensor,
    log_q: Tensor | None,
    temperature: float,
    mask_collisions: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    request = SampledSoftmaxRequest(queries, rows, positives, negatives, log_q, temperature, mask_collisions)
    request.check()
    loss, logsumexp = SAMPLED_SOFTMAX_LOSS.forward(request, backend, queries.device)
    return loss, logsumexp


@_forward.register_fake
def _(queries: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.new_empty(queries.shape[:1], dtype=dtype), queries.new_empty(queries.shape[:1], dtype=dtype)


@torch.library.custom_op("npu_rec::sampled_softmax_loss_backward", mutates_args=())
def _backward(
    grad: Tensor,
    queries: Tensor,
    rows: Tensor,
    positives: Tensor,
    negatives: Tensor,
    log_q: Tensor | None,
    logsumexp: Tensor,
    temperature: float,
    mask_collisions: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    request = SampledSoftmaxRequest(queries, rows, positives, negatives, log_q, temperature, mask_collisions)
    d_queries, d_rows = SAMPLED_SOFTMAX_LOSS.backward(request, backend, queries.device, logsumexp, grad)
    return d_queries, d_rows


@_backward.register_fake
def _(grad: Tensor, queries: Tensor, rows: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), rows.new_empty(rows.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.constants = inputs[5:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_queries, d_rows = torch.ops.npu_rec.sampled_softmax_loss_backward(
        grad,
        *ctx.saved_tensors,  # type: ignore[attr-defined]
        *ctx.constants,  # type: ignore[attr-defined]
    )
    return d_queries, d_rows, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
