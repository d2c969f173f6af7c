"""The CPU: always there."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from npu_rec.device.profile import HardwareProfile


def unavailable() -> str | None:
    """None: a CPU can always be used."""
    return None


def count() -> int:
    """One: all cores together are one device."""
    return 1


def profile(index: int) -> HardwareProfile:
    """The host's processor and memory."""
    instruction_set = torch.backends.cpu.get_cpu_capability().lower()
    return HardwareProfile(
        _model(),
        physical_cores=_physical_cores(),
        logical_cores=os.cpu_count(),
        memory_bytes=_memory_bytes(),
        capabilities=frozenset() if instruction_set in ("default", "no avx") else frozenset({instruction_set}),
    )


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # Arm kernels print no model name.
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _physical_cores() -> int | None:
    # /proc/cpuinfo has no core numbers on Arm; the lists of sibling threads exist on every Linux.
    siblings = set()
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        try:
            siblings.add(path.read_text())
        except OSError:
            return None
    return len(siblings) or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
