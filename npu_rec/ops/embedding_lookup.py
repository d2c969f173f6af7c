"""Rows of an embedding table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.registry import Backend, operator


@dataclass(frozen=True)
class EmbeddingLookupRequest:
    """Arguments of `embedding_lookup` (shapes there)."""

    table: Tensor
    ids: Tensor

    @staticmethod
    def sample(device: torch.device) -> EmbeddingLookupRequest:
        """A small request: V = 8, D = 16, T = 4."""
        return EmbeddingLookupRequest(torch.zeros(8, 16, device=device), torch.arange(4, device=device))


def _reference_forward(request: EmbeddingLookupRequest) -> Tensor:
    return request.table.index_select(0, request.ids)


def _reference_backward(request: EmbeddingLookupRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad.new_zeros(request.table.shape).index_add_(0, request.ids, grad),)


EMBEDDING_LOOKUP = operator(
    "embedding_lookup",
    Backend("reference", _reference_forward, _reference_backward),
    sample=EmbeddingLookupRequest.sample,
)


def embedding_lookup(table: Tensor, ids: Tensor, *, backend: str = "auto") -> Tensor:
    """`table [V, D]`, `ids [T]` int64 -> `[T, D]`; the gradient of the table is dense.

    Raises:
        ValueError: shapes do not fit.
        IndexError: an id lies outside the table.
    """
    if table.dim() != 2 or ids.dim() != 1:
        raise ValueError(f"table must be [V, D] and ids [T], got {list(table.shape)}, {list(ids.shape)}")
    return torch.ops.npu_rec.embedding_lookup(table, ids, backend)  # type: ignore[no-any-return]


@torch.library.custom_op("npu_rec::embedding_lookup", mutates_args=())
def _forward(table: Tensor, ids: Tensor, backend: str) -> Tensor:
    request = EmbeddingLookupRequest(table, ids)
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


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(*inputs[:2])
    ctx.backend = inputs[2]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, ids = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.npu_rec.embedding_lookup_backward(grad, table, ids, ctx.backend), None, None  # type: ignore[attr-defined]


_forward.register_autograd(_autograd, setup_context=_setup_context)
