"""`sampled_softmax_loss` in Triton for Ascend (kernels/ascend): reads the negatives where they lie."""

from __future__ import annotations

from torch import Tensor

from npu_rec.ops.registry import Backend
from npu_rec.ops.sampled_softmax_loss_request import SampledSoftmaxRequest
from npu_rec.ops.triton_ascend_support import unusable, vector_cores
from npu_rec.ops.triton_support import INTERPRETED

WIDEST = 1024  # a few vectors lie whole in the memory of a vector core


def supports(request: SampledSoftmaxRequest) -> str | None:
    """float32, bfloat16 and float16, up to a width; computes in float32."""
    width = request.rows.shape[1]
    if not 1 <= width <= WIDEST:
        return f"vectors are {width} wide; 1 to {WIDEST}"
    return unusable(request.queries, request.rows)


def forward(request: SampledSoftmaxRequest) -> tuple[Tensor, Tensor]:
    """(loss `[T]`, logsumexp `[T]`)."""
    from npu_rec.kernels.ascend import sampled_softmax

    return sampled_softmax.forward(
        request.queries,
        request.rows,
        request.positives,
        request.negatives,
        request.log_q,
        request.temperature,
        request.mask_collisions,
        vector_cores(request.rows),
    )


def backward(request: SampledSoftmaxRequest, logsumexp: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and rows."""
    from npu_rec.kernels.ascend import sampled_softmax

    return sampled_softmax.backward(
        grad,
        logsumexp,
        request.queries,
        request.rows,
        request.positives,
        request.negatives,
        request.log_q,
        request.temperature,
        request.mask_collisions,
        vector_cores(request.rows),
    )


BACKEND = Backend("triton_ascend", forward, backward, supports, by_name_only=INTERPRETED)
