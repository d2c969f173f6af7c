"""`hstu_attention` and `softmax_attention` with position and time bias, against their padded forms.

On an accelerator also HSTU's in bfloat16 against PyTorch's softmax attention.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from npu_rec.bench.harness import COPIES, Contender, Row, compare, usable
from npu_rec.device import Device
from npu_rec.ops import (
    RelativeBias,
    hstu_attention,
    hstu_attention_reference,
    softmax_attention,
    softmax_attention_reference,
)
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.masks import MaskRule
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest

BUCKETS = 128
RAGGED = [
    (1024, 4, 64, [1024, 1000, 860, 640, 520, 410, 250, 130]),
    (4096, 4, 64, [2200, 1320]),
    (211, 2, 25, [int(n) for n in torch.linspace(10, 211, 32)]),
]
FULL = [(n, 4, dim, [n] * 32) for dim in (64, 128) for n in (2048, 4096)]


def run(device: Device, repeats: int) -> list[Row]:
    """Ragged lengths in float32 on every device; on an accelerator also full lengths in bfloat16."""
    rows = []
    for n, heads, dim, lengths in RAGGED:
        copies = [_inputs(device, n, heads, dim, lengths) for _ in range(COPIES)]
        contenders = [Contender("padded PyTorch", partial(_padded, n))]
        contenders += [Contender(backend, partial(_fused, n, backend)) for backend in _usable(n, copies[0])]
        rows += _compare(n, heads, dim, lengths, contenders, copies, device, repeats)
        softmax = [Contender("padded PyTorch", partial(_padded_softmax, n))]
        softmax += [Contender(b, partial(_softmax, n, b)) for b in _usable_for_softmax(n, copies[0])]
        rows += _compare(n, heads, dim, lengths, softmax, copies, device, repeats, name="softmax_attention")
    for n, heads, dim, lengths in [] if device.is_cpu else FULL:
        copies = [_inputs(device, n, heads, dim, lengths, torch.bfloat16) for _ in range(COPIES)]
        contenders = [Contender("PyTorch softmax attention, no bias", partial(_sdpa, n))]
        for backend in (name for name in _usable(n, copies[0]) if name != "tiled"):
            contenders += [
                Contender(f"{backend}, no bias", partial(_without_bias, n, backend)),
                Contender(backend, partial(_fused, n, backend)),
            ]
        rows += _compare(n, heads, dim, lengths, contenders, copies, device, repeats, torch.bfloat16)
    return rows


def _compare(
    n: int,
    heads: int,
    dim: int,
    lengths: list[int],
    contenders: list[Contender],
    copies: list[tuple[Tensor, ...]],
    device: Device,
    repeats: int,
    dtype: torch.dtype = torch.float32,
    name: str = "attention",
) -> list[Row]:
    shape = "softmax, " if name == "softmax_attention" else ""
    shape += f"B={len(lengths)} N={n} H={heads} D={dim} T={sum(lengths)}"
    shape += "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    forward = 4.0 * heads * dim * pairs  # two products, the causal half
    flops = (forward, 2.5 * forward)  # five products
    return compare(name, shape, contenders, copies, device, repeats=repeats, flops=flops, dtype=dtype)


def _usable(n: int, inputs: tuple[Tensor, ...]) -> list[str]:
    return usable("hstu_attention", _request(n, *inputs))


def _inputs(
    device: Device, n: int, heads: int, dim: int, lengths: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    at = device.torch_device
    q, k, v = torch.randn(3, sum(lengths), heads, dim, device=at, dtype=dtype).unbind()
    position, time = torch.randn(2 * n - 1, device=at), torch.randn(BUCKETS + 1, device=at)
    # gaps between events from a second to some weeks, as in logs
    keys = [(torch.rand(length) * 14).exp().long().cumsum(0) for length in lengths]
    queries = [torch.cat([key[1:], key[-1:]]) for key in keys]
    offsets = lengths_to_offsets(torch.tensor(lengths))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, position, time)]
    return (*leaves, *(x.to(at) for x in (torch.cat(queries), torch.cat(keys), offsets)))


def _request(
    n: int, q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor, *rest: Tensor
) -> HSTUAttentionRequest:
    query_time, key_time, offsets = rest
    return HSTUAttentionRequest(
        q, k, v, offsets, None, position, time, query_time, key_time, n, 1.0, float(n), MaskRule()
    )


def _padded(n: int, *inputs: Tensor) -> Tensor:
    """What one writes without an operator, as Meta's research code: padded to N, bias and buckets included."""
    return hstu_attention_reference.attention(_request(n, *inputs), *inputs[:5], pad_to=n)


def _fused(n: int, backend: str, *inputs: Tensor) -> Tensor:
    q, k, v, position, time, query_time, key_time, offsets = inputs
    bias = RelativeBias(position, time, query_time, key_time)
    return hstu_attention(q, k, v, offsets, max_seq_len=n, bias=bias, backend=backend)


def _without_bias(n: int, backend: str, *inputs: Tensor) -> Tensor:
    q, k, v, _, _, _, _, offsets = inputs
    return hstu_attention(q, k, v, offsets, max_seq_len=n, backend=backend)


def _softmax_request(n: int, *inputs: Tensor) -> SoftmaxAttentionRequest:
    q, k, v, position, time, query_time, key_time, offsets = inputs
    scale = q.shape[2] ** -0.5
    return SoftmaxAttentionRequest(
        q, k, v, offsets, None, position, time, query_time, key_time, None, n, scale, 0.0, MaskRule()
    )


def _usable_for_softmax(n: int, inputs: tuple[Tensor, ...]) -> list[str]:
    return usable("softmax_attention", _softmax_request(n, *inputs))


def _padded_softmax(n: int, *inputs: Tensor) -> Tensor:
    """As `_padded`, but padded to the longest sequence of the batch."""
    return softmax_attention_reference.attention(_softmax_request(n, *inputs), *inputs[:5])


def _softmax(n: int, backend: str, *inputs: Tensor) -> Tensor:
    q, k, v, position, time, query_time, key_time, offsets = inputs
    bias = RelativeBias(position, time, query_time, key_time)
    return softmax_attention(q, k, v, offsets, max_seq_len=n, bias=bias, backend=backend)


def _sdpa(n: int, *inputs: Tensor) -> Tensor:
    """Causal softmax attention over sequences that are all N long."""
    q, k, v = (x.unflatten(0, (-1, n)).transpose(1, 2) for x in inputs[:3])
    return scaled_dot_product_attention(q, k, v, is_causal=True)
