"""`norm_gate` at the width of MovieLens-1M and at a large one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm

from npu_rec.bench.harness import COPIES, Contender, Row, compare, usable
from npu_rec.device import Device
from npu_rec.ops import norm_gate
from npu_rec.ops.norm_gate_request import NormGateRequest
from npu_rec.ops.random import random_key


def run(device: Device, repeats: int) -> list[Row]:
    """The gate is a slice of a wider tensor, as in an HSTU layer."""
    total, probability, eps = 25_000, 0.2, 1e-6
    at = device.torch_device
    rows = []
    for width in (50, 512):

        def inputs(width: int = width) -> tuple[Tensor, ...]:
            x, wide = torch.randn(total, width, device=at), torch.randn(total, 4 * width, device=at)
            keys = random_key(0, "dropout", torch.arange(total, device=at))
            return x.requires_grad_(), wide[:, :width].requires_grad_(), keys

        def plain(x: Tensor, gate: Tensor, keys: Tensor) -> Tensor:
            return dropout(layer_norm(x, x.shape[1:], eps=eps) * gate, probability)

        def fused(backend: str, x: Tensor, gate: Tensor, keys: Tensor) -> Tensor:
            return norm_gate(x, gate, eps=eps, dropout=probability, dropout_keys=keys, backend=backend)

        copies = [inputs() for _ in range(COPIES)]
        x, gate, keys = copies[0]
        request = NormGateRequest(x, gate, None, None, keys, eps, probability)
        contenders = [Contender("plain PyTorch", plain)]
        contenders += [Contender(backend, partial(fused, backend)) for backend in usable("norm_gate", request)]
        shape = f"T={total} C={width} dropout={probability}"
        rows += compare("norm-gate", shape, contenders, copies, device, repeats=repeats)
    return rows
