"""`embedding_lookup`, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest
from npu_rec.ops.registry import Backend


def forward(request: EmbeddingLookupRequest) -> Tensor:
    """`[T, D]`."""
    return request.table.index_select(0, request.ids)


def backward(request: EmbeddingLookupRequest, grad: Tensor) -> tuple[Tensor | None]:
    """The gradient of the table; with an update, (None,)."""
    if request.update is not None:
        _update(request, grad)
        return (None,)
    total = torch.zeros(request.table.shape, dtype=_sum_dtype(grad), device=grad.device)
    return (total.index_add_(0, request.ids, grad.to(total.dtype)).to(grad.dtype),)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _update(request: EmbeddingLookupRequest, grad: Tensor) -> None:
    """Sum the gradients of equal ids, then change their rows (equations: `RowOptimizer`)."""
    update, table = request.update, request.table
    assert update is not None
    dtype = _sum_dtype(table)
    rows, place = torch.unique(request.ids, return_inverse=True)
    g = torch.zeros(rows.shape[0], table.shape[1], dtype=dtype, device=table.device)
    g.index_add_(0, place, grad.to(dtype))
    finite = g.square().sum(1).isfinite()
    rows, g = rows[finite], g[finite]
    if update.max_norm is not None:
        length = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        g = torch.where(length > update.max_norm, g * (update.max_norm / length), g)
    direction = g
    if update.name == "rowwise_adagrad":
        assert update.square is not None
        update.square[rows] += g.square().mean(1).to(update.square.dtype)
        direction = g / (update.square[rows].to(dtype).sqrt() + update.eps).unsqueeze(1)
    elif update.name == "rowwise_adam":
        assert update.square is not None
        assert update.momentum is not None
        (beta1, beta2), (correction1, correction2) = update.betas, update.corrections
        momentum = beta1 * update.momentum[rows].to(dtype) + (1.0 - beta1) * g
        square = beta2 * update.square[rows].to(dtype) + (1.0 - beta2) * g.square().mean(1)
        update.momentum[rows], update.square[rows] = momentum.to(update.momentum), square.to(update.square)
        direction = momentum / correction1 / ((square / correction2).sqrt() + update.eps).unsqueeze(1)
    table[rows] = (table[rows].to(dtype) - update.lr * direction).to(table.dtype)


BACKEND = Backend("reference", forward, backward)
