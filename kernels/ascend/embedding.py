"""Rows of a table, the table's gradient, and the update of the rows in the place of a gradient, on Ascend.

A program a vector core; each distinct id is one program's, in turn, and the sum of its lookups has a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_rec.kernels.ascend.segment_sum import block_for, padded, rows_for, segment_total
from npu_rec.kernels.triton.launch import packed
from npu_rec.kernels.triton.row_update_tile import mean_square, moving_average
from npu_rec.kernels.triton.segment_sum import segments_of

AT_ONCE = 8  # loads of a lookup that are under way together


@triton.jit(do_not_specialize=["total"])
def lookup_kernel(table, ids, out, total, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows at a time; the last ones are looked up twice rather than masked."""
    columns = tl.arange(0, BLOCK)
    for block in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        for i in tl.static_range(ROWS):
            token = tl.minimum(block * ROWS + i, total - 1).to(tl.int64)
            row = tl.load(table + tl.load(ids + token) * stride + columns, mask=columns < WIDTH)
            tl.store(out + token * WIDTH + columns, row, mask=columns < WIDTH)


@triton.jit
def root(x, columns):
    """The square root of a number, taken by the vector unit: a vector of equal roots would become scalar code."""
    return tl.sum(tl.sqrt(tl.where(columns.to(tl.float32) < 1.0, x, 0.0)), 0)


@triton.jit
def shortened(g, max_norm, columns):
    """`g`, scaled to the length `max_norm` where it is longer."""
    length = root(tl.sum(g * g, 0), columns)
    longer = length > max_norm
    return tl.where(longer, g * (max_norm / tl.where(longer, length, 1.0)), g)


@triton.jit(do_not_specialize=["segments"])
def rows_kernel(
    table, square, momentum, grad, order, ids, bounds, segments, stride, stride_grad,
    lr, beta1, rest1, beta2, rest2, correction1, correction2, eps, max_norm,
    RULE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of the lookups of each distinct id and ends in its row of `table`.

    RULE: the name of a row optimiser, or `gradient`: the sum is stored.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    for segment in range(tl.program_id(0), segments, tl.num_programs(0)):
        begin, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
        if begin < end:
            g = segment_total(grad, stride_grad, None, order, begin, end, columns, ROWS, BLOCK)
            row = tl.load(ids + begin).to(tl.int64)
            at = table + row * stride + columns
            if RULE == "gradient":
                tl.store(at, g.to(table.dtype.element_ty), mask=inside)
            elif tl.sum(g * g, 0) < float("inf"):  # a gradient that is not finite leaves its row alone
                if max_norm is not None:
                    g = shortened(g, max_norm, columns)
                if RULE == "rowwise_adagrad":
                    s = tl.load(square + row) + mean_square(g, WIDTH)
                    tl.store(square + row, s)
                    g = g / (root(s, columns) + eps)
                if RULE == "rowwise_adam":
                    s = moving_average(tl.load(square + row), mean_square(g, WIDTH), beta2, rest2)
                    at_momentum = momentum + row * WIDTH + columns
                    m = moving_average(tl.load(at_momentum, mask=inside, other=0.0), g, beta1, rest1)
                    tl.store(square + row, s)
                    tl.store(at_momentum, m, mask=inside)
                    g = m / correction1 / (root(s / correction2, columns) + eps)
                w = tl.load(at, mask=inside, other=0.0).to(tl.float32) - lr * g
                tl.store(at, w.to(table.dtype.element_ty), mask=inside)


def lookup(table: Tensor, ids: Tensor, programs: int) -> Tensor:
    """`[T, D]`."""
    table = packed(table)
    total, width = ids.shape[0], table.shape[1]
    out = torch.empty(total, width, dtype=table.dtype, device=table.device)
    if total:
        lookup_kernel[(programs,)](
            table, ids.contiguous(), out, total, table.stride(0), WIDTH=width, ROWS=AT_ONCE, BLOCK=block_for(width)
        )
    return out


def gradient(grad: Tensor, ids: Tensor, count: int, programs: int) -> Tensor:
    """`[V, D]`, V = `count`, of the dtype of `grad [T, D]`."""
    d_table = torch.zeros(count, grad.shape[1], dtype=grad.dtype, device=grad.device)
    _change_rows(d_table, grad, ids, "gradient", 0.0, (0.0, 0.0), (1.0, 1.0), 0.0, None, None, None, programs)
    return d_table


def update(
    table: Tensor, grad: Tensor, ids: Tensor, name: str, lr: float, betas: tuple[float, float],
    corrections: tuple[float, float], eps: float, max_norm: float | None, square: Tensor | None,
    momentum: Tensor | None, programs: int,
) -> None:  # fmt: skip
    """Update the rows of `table` that `ids` name, and their state, in place.

    Arguments as those of kernels/triton/embedding.py.
    """
    _change_rows(table, grad, ids, name, lr, betas, corrections, eps, max_norm, square, momentum, programs)


def _change_rows(
    table: Tensor, grad: Tensor, ids: Tensor, rule: str, lr: float, betas: tuple[float, float],
    corrections: tuple[float, float], eps: float, max_norm: float | None, square: Tensor | None,
    momentum: Tensor | None, programs: int,
) -> None:  # fmt: skip
    if not ids.shape[0]:
        return
    count, width = table.shape
    block, grad = block_for(width), padded(grad)
    sorted_ids, order, bounds = segments_of(ids, count)
    rows_kernel[(programs,)](
        table, square, momentum, grad, order, sorted_ids, bounds, bounds.shape[0] - 1, table.stride(0), grad.stride(0),
        lr, betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], *corrections, eps, max_norm,
        RULE=rule, WIDTH=width, ROWS=rows_for(block), BLOCK=block,
    )  # fmt: skip
