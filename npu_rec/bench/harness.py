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
from npu_rec.ops import OPERATORS
from npu_rec.train.throughput import matmul_flops

COPIES = 2  # of the inputs of a case, used in rotation


@dataclass(frozen=True)
class Contender:
    """One way to compute a case: `call(*inputs, *own)` gives the output, gradients flow to what requires them.

    Attributes:
        learn: takes the output and its gradient and goes backward, where that is more than to compute gradients:
            an update of parameters. It counts as part of the backward pass.
    """

    backend: str
    call: Callable[..., Tensor]
    own: tuple[Tensor, ...] = ()
    learn: Callable[[Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the result. Times are medians; `speedup` is against the case's first contender.

    Attributes:
        fraction_of_gemm: useful floating-point operations a second over those of a matrix product, measured alongside.
        forward_tflops, backward_tflops: useful floating-point operations, 10^12 a second.
        rows_per_second: rows of a table looked up, their backward pass included; None where none are.
        attention_flops_saved: share of the attention's operations that Stochastic Length saved in what it drew, and
            what its rule is expected to save for those lengths; None elsewhere.
    """

    name: str
    backend: str
    shape: str
    forward_ms: float
    backward_ms: float
    speedup: float
    peak_extra_bytes: int | None
    fraction_of_gemm: float | None = None
    rows_per_second: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    attention_flops_saved: float | None = None
    attention_flops_saved_expected: float | None = None

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
    flops: tuple[float, float] | None = None,
    dtype: torch.dtype = torch.float32,
    table_rows: int | None = None,
) -> list[Row]:
    """Time contenders in turn (A B A B ...) after a warm-up, so that they share the machine's ups and downs.

    Args:
        copies: inputs of the case, several equal-shaped sets used in rotation.
        flops: useful floating-point operations of forward and backward, or None.
        dtype: of the matrix product that `fraction_of_gemm` compares with.
        table_rows: how many rows of a table are looked up, for `rows_per_second`, or None.
    """
    gemm_flops = None if flops is None else matmul_flops(device, dtype, size=1024 if device.is_cpu else 8192)
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
        rows.append(
            Row(
                name,
                contender.backend,
                shape,
                forward_ms[i],
                backward_ms[i],
                speedup=(forward_ms[0] + backward_ms[0]) / total,
                peak_extra_bytes=memory[i],
                fraction_of_gemm=sum(flops) / (total * 1e-3) / gemm_flops if flops and gemm_flops else None,
                rows_per_second=None if table_rows is None else table_rows / (total * 1e-3),
                forward_tflops=flops[0] / forward_ms[i] * 1e-9 if flops else None,
                backward_tflops=flops[1] / backward_ms[i] * 1e-9 if flops else None,
            )
        )
    return rows


def usable(operator: str, request: object) -> list[str]:
    """The backends worth timing: not the reference, and none under an interpreter."""
    backends = [b for b in OPERATORS[operator].backends if b.name != "reference" and not b.by_name_only]
    return [b.name for b in backends if b.supports(request) is None]


def _time(contender: Contender, inputs: Sequence[Any], device: Device) -> tuple[float, float]:
    inputs = (*inputs, *contender.own)
    device.synchronize()
    start = perf_counter()
    out = contender.call(*inputs)
    device.synchronize()
    middle = perf_counter()
    _go_backward(contender, inputs, out)
    device.synchronize()
    return middle - start, perf_counter() - middle


def _go_backward(contender: Contender, inputs: Sequence[Any], out: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the inputs that it uses, for a gradient of ones; none where the contender learns."""
    grad = torch.ones_like(out)
    if contender.learn is not None:
        contender.learn(out, grad)
        return ()
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return tuple(g for g in torch.autograd.grad(out, leaves, grad, allow_unused=True) if g is not None)


def _peak_extra_bytes(contender: Contender, inputs: Sequence[Any], device: Device) -> int | None:
    """Memory that forward and backward took at most, beyond inputs, output, its gradient and those of the inputs."""
    inputs = (*inputs, *contender.own)
    out = contender.call(*inputs)  # what is made once and kept does not count
    if contender.learn is not None:
        contender.learn(out, torch.ones_like(out))
    del out
    gc.collect()
    before = _reset_peak(device)
    if before is None:
        return None
    out = contender.call(*inputs)
    grads = _go_backward(contender, inputs, out)
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
