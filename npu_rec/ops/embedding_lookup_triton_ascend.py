"""`embedding_lookup` in Triton for Ascend (kernels/ascend): with an update there is no gradient of the table."""

from __future__ import annotations

from torch import Tensor

from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.triton_ascend_support import unusable, vector_cores
from npu_rec.ops.triton_support import INTERPRETED

WIDEST = 1024  # a few rows lie whole in the memory of a vector core


def supports(request: EmbeddingLookupRequest) -> str | None:
    """float32, bfloat16 and float16, up to a width; sums and updates in float32."""
    table, update = request.table, request.update
    if not 1 <= table.shape[1] <= WIDEST:
        return f"rows are {table.shape[1]} wide; 1 to {WIDEST}"
    if update is None:
        return unusable(table)
    if table.stride(1) != 1:
        return "an update needs rows with a stride of 1"
    return unusable(table)


def forward(request: EmbeddingLookupRequest) -> Tensor:
    """`[T, D]`."""
    from npu_rec.kernels.ascend import embedding

    return embedding.lookup(request.table, request.ids, vector_cores(request.table))


def backward(request: EmbeddingLookupRequest, grad: Tensor) -> tuple[Tensor | None]:
    """The gradient of the table; with an update, (None,)."""
    from npu_rec.kernels.ascend import embedding

    update, programs = request.update, vector_cores(request.table)
    if update is None:
        return (embedding.gradient(grad, request.ids, request.table.shape[0], programs),)
    embedding.update(
        request.table,
        grad,
        request.ids,
        update.name,
        update.lr,
        update.betas,
        update.corrections,
        update.eps,
        update.max_norm,
        update.square,
        update.momentum,
        programs,
    )
    return (None,)


BACKEND = Backend("triton_ascend", forward, backward, supports, by_name_only=INTERPRETED)
