"""The device object that everything above this folder works with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity

from npu_rec.device.profile import HardwareProfile

DeviceName = Literal["ascend", "cuda", "cpu"]

_ACTIVITIES = {"ascend": [ProfilerActivity.PrivateUse1], "cuda": [ProfilerActivity.CUDA], "cpu": []}


@dataclass(frozen=True)
class Device:
    """One device of one process; `get_device` makes it.

    Attributes:
        name: `ascend`, `cuda` or `cpu`.
        torch_device: Where tensors go, for example `npu:0`.
        dispatch_key: The key under which operators register kernels for it.
        collective_backend: The torch.distributed backend that moves its tensors.
        visible_devices_variable: The environment variable that selects cards; None for the CPU.
        profile: What is known about the hardware.
    """

    name: DeviceName
    torch_device: torch.device
    dispatch_key: Literal["CPU", "CUDA", "PrivateUse1"]
    collective_backend: Literal["gloo", "nccl", "hccl"]
    visible_devices_variable: str | None
    profile: HardwareProfile

    @property
    def is_cpu(self) -> bool:
        """Whether there is no accelerator to wait for and no memory of its own to measure."""
        return self.name == "cpu"

    def synchronize(self) -> None:
        """Wait until everything queued on the device has run."""
        if not self.is_cpu:
            torch.accelerator.synchronize(self.torch_device)

    def memory_allocated(self) -> int | None:
        """Bytes that tensors hold on the device; None on the CPU, where PyTorch does not count."""
        return None if self.is_cpu else torch.accelerator.memory_allocated(self.torch_device)

    def max_memory_allocated(self) -> int | None:
        """The most bytes that tensors held since the start or `reset_peak_memory`; None on the CPU."""
        return None if self.is_cpu else torch.accelerator.max_memory_allocated(self.torch_device)

    def reset_peak_memory(self) -> None:
        """Start `max_memory_allocated` anew."""
        if not self.is_cpu:
            torch.accelerator.reset_peak_memory_stats(self.torch_device)

    def manual_seed(self, seed: int) -> None:
        """Seed PyTorch's generators, the host's and the device's."""
        torch.manual_seed(seed)

    def rng_state(self) -> torch.Tensor | None:
        """State of the device's generator, a uint8 tensor on the host; None on the CPU (`torch.get_rng_state`)."""
        if self.is_cpu:
            return None
        state: torch.Tensor = torch.get_device_module(self.torch_device).get_rng_state(self.torch_device)
        return state

    def set_rng_state(self, state: torch.Tensor | None) -> None:
        """Put back what `rng_state` returned."""
        if state is not None and not self.is_cpu:
            torch.get_device_module(self.torch_device).set_rng_state(state.cpu(), self.torch_device)

    def autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
        """A context that runs matrix products in `dtype`; None changes nothing."""
        return nullcontext() if dtype is None else torch.autocast(self.torch_device.type, dtype=dtype)

    def profiler_activities(self) -> list[ProfilerActivity]:
        """What torch.profiler records: the host, and the device's kernels (on Ascend from torch_npu 2.13 on)."""
        return [ProfilerActivity.CPU, *_ACTIVITIES[self.name]]

    def set_threads(self, threads: int | None) -> None:
        """CPU threads of this process; None leaves PyTorch's choice."""
        if threads is not None:
            torch.set_num_threads(threads)
