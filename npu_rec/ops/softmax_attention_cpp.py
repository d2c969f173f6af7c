"""`softmax_attention` in C++ for the CPU (kernels/cpu): a block of queries at a time, its scores in the cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from npu_rec.ops import attention_cpp
from npu_rec.ops.registry import Backend
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest


def _arguments(request: SoftmaxAttentionRequest) -> Any:
    return attention_cpp.arguments("softmax", request, dropout=request.dropout, dropout_keys=request.dropout_keys)


def forward(request: SoftmaxAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    return attention_cpp.forward(_arguments(request))


def backward(request: SoftmaxAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, position_weight, time_weight."""
    return attention_cpp.backward(_arguments(request), request, grad)


BACKEND = Backend("cpp", forward, backward, attention_cpp.supports)
