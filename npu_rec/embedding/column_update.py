"""Rows of a table of which every rank holds some columns: an update needs the squares of all columns of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_rec.distributed import World
from npu_rec.ops import RowOptimizer
from npu_rec.ops.embedding_lookup_reference import sum_by_row, update_rows
from npu_rec.ops.row_optimizer import RowUpdate


def lookup_columns(weight: Tensor, rows: Tensor, optimizer: RowOptimizer, width: int, world: World) -> Tensor:
    """`weight [V, columns]`, `rows [R]`, the same on all ranks -> `[R, columns]`; the backward pass updates them.

    Args:
        width: D, the columns of all ranks together.
    """
    return _ColumnLookup.apply(weight, rows, optimizer, width, world)  # type: ignore[no-any-return, no-untyped-call]


class _ColumnLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, optimizer: RowOptimizer, width: int, world: World) -> Tensor:
        ctx.weight, ctx.optimizer, ctx.width, ctx.world = weight.detach(), optimizer, width, world
        ctx.save_for_backward(rows)
        return weight.detach().index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None, None]:
        optimizer: RowOptimizer = ctx.optimizer
        (ids,) = ctx.saved_tensors
        rows, g = sum_by_row(ids, gradient, ctx.weight.dtype)
        squares = ctx.world.all_reduce(g.square().sum(1), "squares of the columns' gradients")
        optimizer.step += 1
        update = RowUpdate(
            optimizer.name, optimizer.lr, optimizer.betas, optimizer.eps, optimizer.max_norm, optimizer.step,
            optimizer.square, optimizer.momentum,
        )  # fmt: skip
        update.check(ctx.weight)
        update_rows(update, ctx.weight, rows, g, squares, ctx.width)
        return None, None, None, None, None
