"""Choosing the device of a process."""

from __future__ import annotations

import logging
import os
from typing import Literal, NamedTuple, Protocol

import torch

from npu_rec.device import ascend, cpu, cuda
from npu_rec.device.device import Device, DeviceName
from npu_rec.device.profile import HardwareProfile
from npu_rec.errors import DeviceError

log = logging.getLogger(__name__)


class Probe(Protocol):
    """What `ascend.py`, `cuda.py` and `cpu.py` each provide."""

    def unavailable(self) -> str | None: ...
    def count(self) -> int: ...
    def profile(self, index: int) -> HardwareProfile: ...


class Backend(NamedTuple):
    """The names by which PyTorch and the vendor know one kind of device."""

    probe: Probe
    torch_type: str
    dispatch_key: Literal["CPU", "CUDA", "PrivateUse1"]
    collective_backend: Literal["gloo", "nccl", "hccl"]
    visible_devices_variable: str | None


# In the order in which `auto` looks.
BACKENDS: dict[DeviceName, Backend] = {
    "ascend": Backend(ascend, "npu", "PrivateUse1", "hccl", "ASCEND_RT_VISIBLE_DEVICES"),
    "cuda": Backend(cuda, "cuda", "CUDA", "nccl", "CUDA_VISIBLE_DEVICES"),
    "cpu": Backend(cpu, "cpu", "CPU", "gloo", None),
}


def get_device(name: Literal["auto", "ascend", "cuda", "cpu"] = "auto") -> Device:
    """The device to run on, made the current one; LOCAL_RANK picks the card.

    Args:
        name: A kind of device, or `auto` for the first usable of ascend, cuda and cpu.

    Raises:
        DeviceError: The named device is absent, with one line on what is missing and how to install it.
    """
    chosen: DeviceName = auto() if name == "auto" else name
    if name == "auto" and chosen != "ascend" and ascend.installed():
        # Whoever installed torch_npu did not mean to train on something else.
        log.warning("device auto passes over ascend: %s", ascend.unavailable())
    if chosen not in BACKENDS:
        raise DeviceError(f"unknown device {name!r}: choose auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[chosen]
    reason = backend.probe.unavailable()
    if reason:
        raise DeviceError(f"device {chosen} cannot be used: {reason}")
    index = 0
    torch_device = torch.device(backend.torch_type)
    if chosen != "cpu":
        index = _local_index(backend)
        torch_device = torch.device(backend.torch_type, index)
        torch.accelerator.set_device_index(index)
    return Device(
        name=chosen,
        torch_device=torch_device,
        dispatch_key=backend.dispatch_key,
        collective_backend=backend.collective_backend,
        visible_devices_variable=backend.visible_devices_variable,
        profile=backend.probe.profile(index),
    )


def card_count(name: Literal["auto", "ascend", "cuda", "cpu"] = "auto") -> int | None:
    """Cards of a kind that this process sees; None for the CPU, and where there is none."""
    chosen = auto() if name == "auto" else name
    probe = BACKENDS[chosen].probe
    return None if chosen == "cpu" or probe.unavailable() else probe.count()


def auto() -> DeviceName:
    """The first usable of ascend, cuda and cpu."""
    return next(name for name, backend in BACKENDS.items() if backend.probe.unavailable() is None)


def _local_index(backend: Backend) -> int:
    rank = os.environ.get("LOCAL_RANK", "0")
    if not rank.isdigit():  # Ascend's Kubernetes operator puts the list of all local ranks there.
        raise DeviceError(f"LOCAL_RANK={rank!r} is not one number; start with torchrun, which sets it for each process")
    count = backend.probe.count()
    if int(rank) >= count:
        raise DeviceError(
            f"LOCAL_RANK={rank}, but this process sees {count} {backend.torch_type} device(s); start at most {count} "
            f"process(es) on this host, or make more visible in {backend.visible_devices_variable}"
        )
    return int(rank)
