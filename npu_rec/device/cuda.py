"""NVIDIA GPUs through torch.cuda."""

from __future__ import annotations

import os

import torch

from npu_rec.device.profile import HardwareProfile


def unavailable() -> str | None:
    """Why CUDA cannot be used here, in one line; None when it can."""
    built_for = torch.accelerator.current_accelerator()
    if built_for is None or built_for.type != "cuda":
        return (
            f"torch {torch.__version__} is a build without CUDA; "
            "install a CUDA build with the pip command that https://pytorch.org/get-started/locally shows"
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        mask = "is not set" if visible is None else f"is {visible!r}"
        return (
            f"torch {torch.__version__} sees no GPU; check that `nvidia-smi` lists one and that its driver is recent "
            f"enough for this build, and that CUDA_VISIBLE_DEVICES does not hide it (it {mask})"
        )
    return None


def count() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


def compute_capability(index: int) -> tuple[int, int]:
    """(major, minor) of the GPU of that index."""
    return torch.cuda.get_device_capability(index)


def profile(index: int) -> HardwareProfile:
    """The GPU of that index."""
    properties = torch.cuda.get_device_properties(index)
    return HardwareProfile(
        properties.name,
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        capabilities=frozenset({f"sm{properties.major}{properties.minor}"}),
    )
