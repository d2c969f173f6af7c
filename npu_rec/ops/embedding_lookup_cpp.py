"""`embedding_lookup` in C++ for the CPU (kernels/cpu): equal ids are sorted together, their row is touched once."""

from __future__ import annotations

import math

from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable
from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest
from npu_rec.ops.registry import Backend


def supports(request: EmbeddingLookupRequest) -> str | None:
    """Contiguous tables of float32, bfloat16 and float16 on the CPU."""
    if not request.table.is_contiguous():
        return "the table is not contiguous"
    return unusable(request.table)


def forward(request: EmbeddingLookupRequest) -> Tensor:
    """`[T, D]`."""
    rows: Tensor = extension().embedding_forward(request.table, request.ids)
    return rows


def backward(request: EmbeddingLookupRequest, grad: Tensor) -> tuple[Tensor | None]:
    """The gradient of the table, summed in float32; with an update, (None,)."""
    if request.update is None:
        return (extension().embedding_backward(grad, request.table, request.ids, instruction_set()),)
    _update(request, grad)
    return (None,)


def _update(request: EmbeddingLookupRequest, grad: Tensor) -> None:
    """The three optimisers as the one of kernels.h, `RowsTask`."""
    update = request.update
    assert update is not None
    lr, (beta1, beta2), square, momentum = update.lr, update.betas, None, None
    rest2, correction2 = 1.0 - beta2, 1.0
    if update.name == "rowwise_adagrad":
        square, beta2, rest2 = update.square, 1.0, 1.0
    elif update.name == "rowwise_adam":
        square, momentum = update.square, update.momentum
        correction1, correction2 = update.corrections
        lr /= correction1
    max_norm = math.inf if update.max_norm is None else update.max_norm
    extension().embedding_update(
        grad, request.table, request.ids, square, momentum, lr, beta1, beta2, rest2, correction2, update.eps, max_norm,
        instruction_set(),
    )  # fmt: skip


BACKEND = Backend("cpp", forward, backward, supports)
