"""Rows of an embedding table, and, on request, their update in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_rec.ops import (
    embedding_lookup_cpp,
    embedding_lookup_reference,
    embedding_lookup_triton,
    embedding_lookup_triton_ascend,
    embedding_lookup_vendor,
)
from npu_rec.ops.checks import check_constants, check_tensors
from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest
from npu_rec.ops.registry import operator
from npu_rec.ops.row_optimizer import RowOptimizer, RowUpdate

EMBEDDING_LOOKUP = operator(
    "embedding_lookup",
    embedding_lookup_cpp.BACKEND,
    embedding_lookup_triton.BACKEND,
    embedding_lookup_vendor.BACKEND,
    embedding_lookup_triton_ascend.BACKEND,
    embedding_lookup_reference.BACKEND,
    sample=EmbeddingLookupRequest.sample,
)


def embedding_lookup(
    table: Tensor, ids: Tensor, *, optimizer: RowOptimizer | None = None, backend: str = "auto"
) -> Tensor:
    """Rows `[T, D]` of a table.

    Args:
        table: `[V, D]`, float64, float32, bfloat16 or float16.
        ids: `[T]` int64.
        optimizer: None: the gradient of `table` is an ordinary dense one. Otherwise the backward pass updates the
            rows in place and `table` gets no gradient: every lookup is one update, in which equal ids are summed
            first; `table` must require a gradient all the same, or there is no backward pass. A second backward pass
            over the same graph updates again, and one that computes the lookup anew (activation checkpointing) must
            not follow another update of the table in that pass.
        backend: `auto`, or the name of one.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the optimizer has the state of another table.
        IndexError: an id lies outside the table (on the CPU; an accelerator would have to wait for the answer).
    """
    check_tensors(floats={"table": table}, indices={"ids": ids})
    check_constants(backend=(backend, str))
    if table.dim() != 2 or ids.dim() != 1:
        raise ValueError(f"table must be [V, D] and ids [T], got {list(table.shape)}, {list(ids.shape)}")
    if optimizer is None:
        return torch.ops.npu_rec.embedding_lookup(table, ids, backend)  # type: ignore[no-any-return]
    if not isinstance(optimizer, RowOptimizer):
        raise TypeError(f"optimizer must be a RowOptimizer or None, got {optimizer!r}")
    optimizer.check(table)
    return _FusedLookup.apply(table, ids, optimizer, backend)  # type: ignore[no-any-return, no-untyped-call]


class _FusedLookup(torch.autograd.Function):
    """A lookup whose backward pass is an update. Not an operator of its own: an operator must not change its inputs
    in a backward pass that autograd knows of."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, optimizer: RowOptimizer, backend: str) -> Tensor:
        # the table is changed before other lookups of the same pass come to their turn, so it is not "saved"
        ctx.table, ctx.optimizer, ctx.backend = table.detach(), optimizer, backend
        ctx.save_for_backward(ids)
        return torch.ops.npu_rec.embedding_lookup(table.detach(), ids, backend)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        optimizer: RowOptimizer = ctx.optimizer
        optimizer.prepare(ctx.table)
        optimizer.check(ctx.table)  # here as well: with a tensor on `meta` the operator below would do nothing
        (ids,) = ctx.saved_tensors
        torch.ops.npu_rec.embedding_update(
            ctx.table, optimizer.square, optimizer.momentum, ids, grad, optimizer.name, optimizer.lr,
            *optimizer.betas, optimizer.eps, optimizer.max_norm, optimizer.step + 1, ctx.backend,
        )  # fmt: skip
        optimizer.step += 1
        return None, None, None, None


@torch.library.custom_op("npu_rec::embedding_lookup", mutates_args=())
def _forward(table: Tensor, ids: Tensor, backend: str) -> Tensor:
    request = EmbeddingLookupRequest(table, ids)
    request.check()
    return EMBEDDING_LOOKUP.forward(request, backend, table.device)  # type: ignore[no-any-return]


@_forward.register_fake
def _(table: Tensor, ids: Tensor, backend: str) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


@torch.library.custom_op("npu_rec::embedding_lookup_backward", mutates_args=())
def _backward(grad: Tensor, table: Tensor, ids: Tensor, backend: str) -> Tensor:
    request = EmbeddingLookupRequest(table, ids)
    return EMBEDDING_LOOKUP.backward(request, backend, table.device, grad)[0]  # type: ignore[no-any-return]


@_backward.register_fake
def _(grad: Tensor, table: Tensor, ids: Tensor, backend: str) -> Tensor:
    return table.new_empty(table.shape)


@torch.library.custom_op("npu_rec::embedding_update", mutates_args=("table", "square", "momentum"))
def _update(
    table: Tensor,
    square: Tensor | None,
    momentum: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    name: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float | None,
    step: int,
    backend: str,
) -> None:
    update = RowUpdate(name, lr, (beta1, beta2), eps, max_norm, step, square, momentum)  # type: ignore[arg-type]
    request = EmbeddingLookupRequest(table, ids, update)
    request.check()
    EMBEDDING_LOOKUP.backward(request, backend, table.device, grad)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(*inputs[:2])
    ctx.backend = inputs[2]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, ids = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.npu_rec.embedding_lookup_backward(grad, table, ids, ctx.backend), None, None  # type: ignore[attr-defined]


_forward.register_autograd(_autograd, setup_context=_setup_context)
