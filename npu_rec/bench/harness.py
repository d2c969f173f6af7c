"""How time and memory are taken."""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from npu_rec.device import Device


@dataclass(frozen=True)
class Contender:
    """One way to compute a case: `call(*inputs, *own)` gives the output, gradients flow to what requires them."""

    backend: str
    call: Callable[..., Tensor]
    own: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the result. Times are medians; `speedup` is against the case's first contender."""

    name: str
    backend: str
    shape: str
    forward_ms: float
    backward_ms: float
    speedup: float
    peak_extra_bytes: int | None
    fraction_of_gemm: float | None = None

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


def compare(
    name: str,
    shape: str,
    contenders: Sequence[Contender],
    copies: Sequence[Sequence[Any]],
    device: Device,
    *,
    repeats: int,
    flops: float | None,
    gemm_flops: float,
) -> list[Row]:
    """Time contenders in turn (A B A B ...) after a warm-up, so that they share the machine's ups and downs.

    Args:
        copies: inputs of the case, several equal-shaped sets used in rotation.
        flops: useful floating-point operations, forward and backward together, or None.
        gemm_flops: FLOP/s of the device's matrix product, for `fraction_of_gemm`.
    """
    memory = [_peak_extra_bytes(contender, copies[0], device) for contender in contenders]  # the warm-up too
    forward: list[list[float]] = [[] for _ in contenders]
    backward: list[list[float]] = [[] for _ in contenders]
    for repeat in range(repeats):
        for i, contender in enumerate(contenders):
            seconds = _time(contender, copies[repeat % len(copies)], device)
            forward[i].append(seconds[0])
            backward[i].append(seconds[1])
    forward_ms = [statistics.median(x) * 1e3 for x in forward]
    backward_ms = [statistics.median(x) * 1e3 for x in backward]
    rows = []
    for i, contender in enumerate(contenders):
        total = forward_ms[i] + backward_ms[i]
        share = None if flops is None else flops / (total * 1e-3) / gemm_flops
        speedup = (forward_ms[0] + backward_ms[0]) / total
        rows.append(Row(name, contender.backend, shape, forward_ms[i], backward_ms[i], speedup, memory[i], share))
    return rows


def _time(contender: Contender, inputs: Sequence[Any], device: Device) -> tuple[float, float]:
    inputs = (*inputs, *contender.own)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    device.synchronize()
    start = perf_counter()
    out = contender.call(*inputs)
    device.synchronize()
    middle = perf_counter()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    device.synchronize()
    return middle - start, perf_counter() - middle


def _peak_extra_bytes(contender: Contender, inputs: Sequence[Any], device: Device) -> int | None:
    """Memory that forward and backward took at most, beyond inputs, output, its gradient and those of the inputs."""
    inputs = (*inputs, *contender.own)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    contender.call(*inputs)  # what is made once and kept does not count
    gc.collect()
    before = _reset_peak(device)
    if before is None:
        return None
    out = contender.call(*inputs)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    device.synchronize()
    results = 2 * out.nbytes + sum(grad.nbytes for grad in grads)
    return max(0, _peak(device) - before - results)


def _reset_peak(device: Device) -> int | None:
    """Start counting anew; the bytes in use now, or None where they cannot be counted."""
    if not device.is_cpu:
        device.reset_peak_memory()
        return device.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the peak hides in it
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _peak(device: Device) -> int:
    return (device.max_memory_allocated() or 0) if not device.is_cpu else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
