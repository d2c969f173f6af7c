"""Model FLOP utilisation: useful floating-point operations over what the device's matrix product reaches."""

from __future__ import annotations

import statistics
import time

import torch

from npu_rec.device import Device


def matmul_flops(device: Device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product on this device, measured: the median of several runs."""
    # ones, not random numbers: the state of the generators belongs to the run that is measured
    a, b = torch.ones(2, size, size, device=device.torch_device, dtype=dtype).unbind()
    seconds = []
    for _ in range(8):
        device.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds[2:])
