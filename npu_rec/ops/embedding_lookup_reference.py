"""`embedding_lookup`, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.row_optimizer import RowUpdate


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
    """Sum the gradients of equal ids, then change their rows."""
    assert request.update is not None
    rows, g = sum_by_row(request.ids, grad, request.table.dtype)
    update_rows(request.update, request.table, rows, g, g.square().sum(1), request.table.shape[1])


def sum_by_row(ids: Tensor, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Distinct `ids [U]` and the sums `[U, D]` of their gradients `grad [T, D]`, float64 for tables of it."""
    rows, place = torch.unique(ids, return_inverse=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.zeros(rows.shape[0], grad.shape[1], dtype=wide, device=grad.device)
    return rows, g.index_add_(0, place, grad.to(wide))


def update_rows(update: RowUpdate, table: Tensor, rows: Tensor, g: Tensor, squares: Tensor, width: int) -> None:
    """Change `table[rows]` by `g [U, columns]` (equations: `RowOptimizer`).

    Args:
        rows: `[U]` distinct.
        squares: `[U]`, of each row of the whole gradient; `table` may hold some of its columns only.
        width: D, columns of the whole table.
    """
    finite = squares.isfinite()
    rows, g, squares = rows[finite], g[finite], squares[finite]
    if update.max_norm is not None:
        scale = (update.max_norm / squares.sqrt().clamp_min(update.max_norm)).unsqueeze(1)
        g, squares = g * scale, squares * scale.squeeze(1).square()
    mean, direction = squares / width, g
    if update.name == "rowwise_adagrad":
        assert update.square is not None
        update.square[rows] += mean.to(update.square.dtype)
        direction = g / (update.square[rows].to(g.dtype).sqrt() + update.eps).unsqueeze(1)
    elif update.name == "rowwise_adam":
        assert update.square is not None
        assert update.momentum is not None
        (beta1, beta2), (correction1, correction2) = update.betas, update.corrections
        momentum = beta1 * update.momentum[rows].to(g.dtype) + (1.0 - beta1) * g
        square = beta2 * update.square[rows].to(g.dtype) + (1.0 - beta2) * mean
        update.momentum[rows], update.square[rows] = momentum.to(update.momentum), square.to(update.square)
        direction = momentum / correction1 / ((square / correction2).sqrt() + update.eps).unsqueeze(1)
    table[rows] = (table[rows].to(g.dtype) - update.lr * direction).to(table.dtype)


BACKEND = Backend("reference", forward, backward)
