"""`norm_gate` by PyTorch's own LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from npu_rec.ops.norm_gate_request import NormGateRequest
from npu_rec.ops.random import dropout
from npu_rec.ops.registry import Backend


def _computed(request: NormGateRequest) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, gate, weight, bias in float32 at least.

    PyTorch's LayerNorm on a CPU sums the gradients of weight and bias in the dtype of x: in bfloat16,
    half of the gradient is lost at 4,096 tokens.
    """
    dtype = request.compute_dtype
    weight = None if request.weight is None else request.weight.to(dtype)
    bias = None if request.bias is None else request.bias.to(dtype)
    return request.x.to(dtype), request.gate.to(dtype), weight, bias


def forward(request: NormGateRequest) -> Tensor:
    """`[T, C]`."""
    x, gate, weight, bias = _computed(request)
    normalised = layer_norm(x, x.shape[-1:], weight, bias, request.eps)
    return dropout(normalised * gate, request.dropout, request.dropout_keys).to(request.x.dtype)


def backward(request: NormGateRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate, weight, bias."""
    # not `backward_by_autograd`: torch.func fails inside a TorchDispatchMode such as FlopCounterMode
    x, gate, weight, bias = _computed(request)
    normalised, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, request.eps)
    d_product = dropout(grad.to(x.dtype), request.dropout, request.dropout_keys)
    wanted = [True, weight is not None, bias is not None]
    dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_product * gate, x, x.shape[-1:], mean, rstd, weight, bias, wanted
    )
    return (
        dx.to(request.x.dtype),
        (d_product * normalised).to(request.gate.dtype),
        None if request.weight is None else d_weight.to(request.weight.dtype),
        None if request.bias is None else d_bias.to(request.bias.dtype),
    )


BACKEND = Backend("reference", forward, backward)
