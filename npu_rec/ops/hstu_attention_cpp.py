"""`hstu_attention` in C++ for the CPU (kernels/cpu): tiles in the cache, the bias made where it is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from npu_rec.ops import attention_cpp
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.registry import Backend


def _arguments(request: HSTUAttentionRequest) -> Any:
    return attention_cpp.arguments("hstu", request, divisor=request.divisor, query_offsets=request.query_offsets)


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[Tq, H, Dv]`."""
    return attention_cpp.forward(_arguments(request))


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    return attention_cpp.backward(_arguments(request), request, grad)


BACKEND = Backend("cpp", forward, backward, attention_cpp.supports)
