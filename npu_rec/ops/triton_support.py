"""Whether Triton kernels (kernels/triton) can run: on a CUDA device, or anywhere under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from npu_rec.device.cuda import compute_capability

# Triton reads it when a kernel is defined, so it must be set before the first use
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _too_old(index: int) -> bool:
    return compute_capability(index) < (8, 0)  # less shared memory than the kernels were built for


def unusable(*tensors: torch.Tensor | None) -> str | None:
    """None when the Triton kernels take these tensors, or the reason why not."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cuda" and not INTERPRETED:
            return f"the tensors are on {tensor.device.type}"
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the dtype is {tensor.dtype}"
        if tensor is not None and tensor.device.type == "cuda" and _too_old(tensor.device.index):
            return "the GPU is older than Ampere (compute capability 8.0)"
    return None if _installed() else "triton is not installed; install it with `pip install triton`"
