"""Whether the Triton kernels for Ascend (kernels/ascend) can run: on an NPU, or anywhere under Triton's interpreter."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from npu_rec.device.ascend import profile
from npu_rec.device.profile import HardwareProfile
from npu_rec.ops.triton_support import INTERPRETED

INTERPRETED_PROGRAMS = 3  # more than one, fewer than there is work


@cache
def _missing() -> str | None:
    """triton-ascend is upstream's package `triton` with a backend of its own inside."""
    if importlib.util.find_spec("triton") is None:
        return "triton-ascend is not installed (docs/ascend.md says what it fits)"
    if INTERPRETED or importlib.util.find_spec("triton.backends.ascend") is not None:
        return None
    return "the installed triton is upstream's, without a backend for Ascend (docs/ascend.md says what fits)"


@cache
def _profile(index: int) -> HardwareProfile:
    return profile(index)


def unusable(*tensors: torch.Tensor | None) -> str | None:
    """None when the kernels for Ascend take these tensors, or the reason why not."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "npu" and not INTERPRETED:
            return f"the tensors are on {tensor.device.type}"
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the dtype is {tensor.dtype}"
    if _missing() is not None or INTERPRETED:
        return _missing()
    chips = [_profile(tensor.device.index) for tensor in tensors if tensor is not None]
    return next(
        (f"the number of cores of {c.chip} is not known" for c in chips if not (c.cube_cores and c.vector_cores)), None
    )


def cube_cores(tensor: torch.Tensor) -> int:
    """Programs of a kernel with matrix products."""
    return INTERPRETED_PROGRAMS if INTERPRETED else _profile(tensor.device.index).cube_cores or 1


def vector_cores(tensor: torch.Tensor) -> int:
    """Programs of a kernel without."""
    return INTERPRETED_PROGRAMS if INTERPRETED else _profile(tensor.device.index).vector_cores or 1
