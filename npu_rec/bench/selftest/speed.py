"""Figures of speed: memory, transfers, matrix products, attention. They pass when they run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from npu_rec.bench.harness import COPIES, Contender, compare
from npu_rec.bench.selftest.attention_cases import BUCKETS
from npu_rec.bench.selftest.check import Check, CheckSkipped, Figures, guarded, reason
from npu_rec.device import Device
from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, RelativeBias, hstu_attention
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.train.throughput import matmul_flops

REPEATS = 5
DTYPES = (torch.float32, torch.bfloat16)


def checks(device: Device) -> Iterator[Check]:
    """One check a figure; one an attention backend."""
    # large shapes only where they take milliseconds
    large = not device.is_cpu and matmul_flops(device, torch.float32) > 2e12
    yield guarded("speed", "copy on the device", partial(_copy, device, 1024 if large else 64))
    yield guarded("speed", "host to device and back", partial(_transfers, device, 256 if large else 16))
    for dtype in DTYPES:
        yield guarded("speed", f"matrix product {_name(dtype)}", partial(_gemm, device, dtype, 8192 if large else 1024))
    for backend in OPERATORS["hstu_attention"].backends:
        if not backend.by_name_only and backend.name != "reference":  # an interpreter, and what nobody trains with
            yield guarded("speed", f"hstu_attention {backend.name}", partial(_attention, device, backend.name, large))


def _copy(device: Device, mebibytes: int) -> tuple[str, Figures]:
    source = torch.ones(mebibytes * 2**18, device=device.torch_device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / _seconds(device, lambda: target.copy_(source)) / 1e9  # read and written
    return f"{rate:.3g} GB/s read and written, {mebibytes} MiB", {"gb_per_second": rate}


def _transfers(device: Device, mebibytes: int) -> tuple[str, Figures]:
    if device.is_cpu:
        raise CheckSkipped("the device is the host")
    figures: Figures = {}
    for kind in ("pageable", "pinned"):
        host = torch.ones(mebibytes * 2**18)
        host = host.pin_memory() if kind == "pinned" else host
        card = torch.empty_like(host, device=device.torch_device)
        for way, target, source in (("to_device", card, host), ("to_host", host, card)):
            seconds = _seconds(device, partial(target.copy_, source))
            figures[f"{kind}_{way}_gb_per_second"] = host.nbytes / seconds / 1e9
    rates = (f"{name.removesuffix('_gb_per_second').replace('_', ' ')} {rate:.3g}" for name, rate in figures.items())
    return f"{', '.join(rates)} GB/s, {mebibytes} MiB", figures


def _gemm(device: Device, dtype: torch.dtype, size: int) -> tuple[str, Figures]:
    rate = matmul_flops(device, dtype, size=size) / 1e12
    return f"{rate:.3g} TFLOP/s, {size} x {size}", {"tflops": rate}


def _attention(device: Device, backend: str, large: bool) -> tuple[str, Figures]:
    """Forward and backward over causal sequences of one length, with the position and time bias and without."""
    n, count, heads, dim = (2048, 16, 4, 64) if large else (256, 4, 2, 32)
    contenders = [
        Contender("with bias", partial(_attend, n, backend, True)),
        Contender("no bias", partial(_attend, n, backend, False)),
    ]
    useful = 4.0 * heads * dim * count * n * (n + 1) / 2  # two products over the causal half, five backward
    figures: Figures = {}
    texts, refusals = [f"B={count} N={n} H={heads} D={dim}, forward / backward"], []
    for dtype in DTYPES:
        copies = [_inputs(device, n, count, heads, dim, dtype) for _ in range(COPIES)]
        try:
            rows = compare("attention", "", contenders, copies, device, repeats=REPEATS)
        except BackendError as error:
            refusals.append(reason(error))
            continue
        for row in rows:
            figures_of = {
                "forward_tflops": useful / row.forward_ms * 1e-9,
                "backward_tflops": 2.5 * useful / row.backward_ms * 1e-9,
                "tokens_per_second": count * n / row.total_ms * 1e3,
            }
            forward, backward, tokens = figures_of.values()
            texts.append(f"{_name(dtype)} {row.backend} {forward:.3g} / {backward:.3g} TFLOP/s {tokens:,.0f} tokens/s")
            prefix = f"{_name(dtype)}_{row.backend.replace(' ', '_')}"
            figures |= {f"{prefix}_{name}": value for name, value in figures_of.items()}
    if not figures:
        raise CheckSkipped(refusals[0])
    return "; ".join([*texts, *refusals]), figures


def _inputs(device: Device, n: int, count: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    place, total = device.torch_device, n * count
    q, k, v = (torch.randn(total, heads, dim).to(place, dtype).requires_grad_() for _ in range(3))
    position, time = (torch.randn(size).to(place).requires_grad_() for size in (2 * n - 1, BUCKETS + 1))
    # gaps between events from a second to some weeks, as in logs
    times = torch.stack([(torch.rand(n) * 14).exp().long().cumsum(0) for _ in range(count)])
    queries = torch.cat([times[:, 1:], times[:, -1:]], 1)
    offsets = lengths_to_offsets(torch.full((count,), n))
    return q, k, v, position, time, *(x.to(place) for x in (queries.flatten(), times.flatten(), offsets))


def _attend(n: int, backend: str, with_bias: bool, *inputs: Tensor) -> Tensor:
    q, k, v, position, time, query_time, key_time, offsets = inputs
    bias = RelativeBias(position, time, query_time, key_time) if with_bias else None
    return hstu_attention(q, k, v, offsets, max_seq_len=n, bias=bias, backend=backend)


def _seconds(device: Device, call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + 2):
        device.synchronize()
        start = perf_counter()
        call()
        device.synchronize()
        times.append(perf_counter() - start)
    return statistics.median(times[2:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
