"""Rows of a table, the table's gradient, and the update of the rows in the place of a gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_rec.kernels.triton.launch import block_of, packed, rows_of, warps_of
from npu_rec.kernels.triton.row_update_tile import mean_square, moving_average, shortened
from npu_rec.kernels.triton.segment_sum import entries_at_once, segment_total, segments_of


@triton.jit(do_not_specialize=["total"])
def lookup_kernel(table, ids, out, total, width, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    rows = tl.load(ids + tokens, mask=tokens < total, other=0).to(tl.int64)
    inside = (tokens < total)[:, None] & (columns < width)
    values = tl.load(table + rows[:, None] * stride + columns, mask=inside)
    tl.store(out + tokens.to(tl.int64)[:, None] * width + columns, values, mask=inside)


@triton.jit
def rows_kernel(
    table, square, momentum, grad, order, ids, bounds, width, stride, stride_grad,
    lr, beta1, rest1, beta2, rest2, correction1, correction2, eps, max_norm,
    RULE: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per distinct id sums the gradients of its lookups and ends in its row of `table`.

    RULE: the name of a row optimiser, or `gradient`: the sum is stored.
    """
    segment = tl.program_id(0)
    start, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    if start < end:
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        g = segment_total(grad, stride_grad, None, order, start, end, 1, width, BLOCK_ENTRIES, BLOCK)
        row = tl.load(ids + start).to(tl.int64)
        at = table + row * stride + columns
        if RULE == "gradient":
            tl.store(at, g.to(table.dtype.element_ty), mask=inside)
        elif tl.sum(g * g, 0) < float("inf"):  # a gradient that is not finite leaves its row alone
            if max_norm is not None:
                g = shortened(g, max_norm)
            # every thread reads the row's number, one writes it: not before all have read
            if RULE == "rowwise_adagrad":
                s = tl.load(square + row) + mean_square(g, width)
                tl.debug_barrier()
                tl.store(square + row, s)
                g = g / (tl.sqrt(s) + eps)
            if RULE == "rowwise_adam":
                s = moving_average(tl.load(square + row), mean_square(g, width), beta2, rest2)
                at_momentum = momentum + row * width + columns
                m = moving_average(tl.load(at_momentum, mask=inside, other=0.0), g, beta1, rest1)
                tl.debug_barrier()
                tl.store(square + row, s)
                tl.store(at_momentum, m, mask=inside)
                g = m / correction1 / (tl.sqrt(s / correction2) + eps)
            w = tl.load(at, mask=inside, other=0.0).to(tl.float32) - lr * g
            tl.store(at, w.to(table.dtype.element_ty), mask=inside)


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """`[T, D]`."""
    table = packed(table)
    total, width = ids.shape[0], table.shape[1]
    out = torch.empty(total, width, dtype=table.dtype, device=table.device)
    block = block_of(width)
    rows = rows_of(block, 64)
    if total:
        lookup_kernel[(triton.cdiv(total, rows),)](
            table, ids.contiguous(), out, total, width, table.stride(0),
            ROWS=rows, BLOCK=block, num_warps=warps_of(rows * block),
        )  # fmt: skip
    return out


def gradient(grad: Tensor, ids: Tensor, count: int) -> Tensor:
    """`[V, D]`, V = `count`, of the dtype of `grad [T, D]`."""
    d_table = torch.zeros(count, grad.shape[1], dtype=grad.dtype, device=grad.device)
    _change_rows(d_table, grad, ids, "gradient", 0.0, (0.0, 0.0), (1.0, 1.0), 0.0, None, None, None)
    return d_table


def update(
    table: Tensor, grad: Tensor, ids: Tensor, name: str, lr: float, betas: tuple[float, float],
    corrections: tuple[float, float], eps: float, max_norm: float | None, square: Tensor | None,
    momentum: Tensor | None,
) -> None:  # fmt: skip
    """Update the rows of `table` that `ids` name, and their state, in place.

    Args:
        table: `[V, D]`, a stride of 1 along its rows.
        grad: `[T, D]`, of the looked-up rows.
        name, lr, betas, eps, max_norm: as in `npu_rec.ops.row_optimizer.RowOptimizer`.
        corrections: `(1 - b1^t, 1 - b2^t)`.
        square: `[V]` float32, contiguous, or None for sgd.
        momentum: `[V, D]` float32, contiguous, for rowwise_adam.
    """
    _change_rows(table, grad, ids, name, lr, betas, corrections, eps, max_norm, square, momentum)


def _change_rows(
    table: Tensor, grad: Tensor, ids: Tensor, rule: str, lr: float, betas: tuple[float, float],
    corrections: tuple[float, float], eps: float, max_norm: float | None, square: Tensor | None,
    momentum: Tensor | None,
) -> None:  # fmt: skip
    if not ids.shape[0]:
        return
    grad = packed(grad)
    count, width = table.shape
    sorted_ids, order, bounds = segments_of(ids, count)
    block = block_of(width)
    entries = rows_of(block, entries_at_once(ids.shape[0], count))
    rows_kernel[(bounds.shape[0] - 1,)](
        table, square, momentum, grad, order, sorted_ids, bounds, width, table.stride(0), grad.stride(0),
        lr, betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], *corrections, eps, max_norm,
        RULE=rule, BLOCK_ENTRIES=entries, BLOCK=block, num_warps=warps_of(entries * block),
    )  # fmt: skip
