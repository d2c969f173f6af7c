"""`sampled_softmax_loss` in C++ for the CPU (kernels/cpu): reads the negatives where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.registry import Backend
from npu_rec.ops.sampled_softmax_loss_request import SampledSoftmaxRequest

ROW_GRADIENT_BYTES = 32 << 20  # each thread has a gradient of all rows; beyond that the chunked backend takes over


def supports(request: SampledSoftmaxRequest) -> str | None:
    """float32, bfloat16 and float16 on the CPU, up to a number of rows."""
    count, width = request.rows.shape
    needed = torch.get_num_threads() * count * (width + 15) * 4
    if needed > ROW_GRADIENT_BYTES:
        return f"gradients of {count} rows for {torch.get_num_threads()} threads exceed {ROW_GRADIENT_BYTES >> 20} MiB"
    return unusable(request.queries, request.rows)


def _arguments(request: SampledSoftmaxRequest) -> tuple[Any, ...]:
    return (
        request.queries,
        request.rows,
        request.positives,
        request.negatives,
        request.log_q,
        request.temperature,
        request.mask_collisions,
        instruction_set(),
    )


def forward(request: SampledSoftmaxRequest) -> tuple[Tensor, Tensor]:
    """(loss `[T]`, logsumexp `[T]`)."""
    loss, logsumexp = extension().sampled_softmax_forward(*_arguments(request))
    return loss, logsumexp


def backward(request: SampledSoftmaxRequest, logsumexp: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and rows."""
    d_queries, d_rows = extension().sampled_softmax_backward(grad, logsumexp, *_arguments(request))
    return d_queries, d_rows


BACKEND = Backend("cpp", forward, backward, supports)
