"""`hstu_attention` in Triton for Ascend (kernels/ascend): the bias, and its gradients, inside the kernel."""

from __future__ import annotations

from torch import Tensor

from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.hstu_attention_triton import call_of, in_their_dtypes, unit_stride
from npu_rec.ops.registry import Backend
from npu_rec.ops.triton_ascend_support import cube_cores, unusable
from npu_rec.ops.triton_support import INTERPRETED

WIDEST = 256
MOST_BUCKETS = 128


def supports(request: HSTUAttentionRequest) -> str | None:
    """float32, bfloat16 and float16, heads up to 256 wide, up to 128 time buckets; accumulates in float32.

    Time buckets are computed in float32: an interval within rounding of a bucket's edge may count to the next one.
    """
    if request.query_offsets is not None:
        return "takes as many queries as keys, no query_offsets"
    widest = max(request.q.shape[2], request.v.shape[2])
    if widest > WIDEST:
        return f"a head is {widest} wide; up to {WIDEST}"
    if request.time_weight is not None and request.time_weight.shape[0] - 1 > MOST_BUCKETS:
        return f"the time table has {request.time_weight.shape[0] - 1} buckets; up to {MOST_BUCKETS}"
    if request.time_weight is not None and request.position_weight is None:
        return "a time bias without a position bias"
    farthest = request.max_seq_len * max(x.stride(0) for x in (request.q, request.k, request.v))
    if farthest >= 2**31:
        return f"a sequence may span {farthest} elements; fewer than 2^31, for int64 addresses are scalar code"
    return unusable(request.q, request.position_weight, request.time_weight)


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    from npu_rec.kernels.ascend import attention

    return attention.forward(call_of(request), cube_cores(request.q))


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    from npu_rec.kernels.ascend import attention

    return in_their_dtypes(request, *attention.backward(call_of(request), unit_stride(grad), cube_cores(request.q)))


BACKEND = Backend("triton_ascend", forward, backward, supports, by_name_only=INTERPRETED)
