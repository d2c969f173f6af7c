"""The compiled CPU kernels (kernels/cpu), when this installation has them."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch

from npu_rec.errors import BackendError

ISA_VARIABLE = "NPU_REC_CPU_ISA"


@cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("npu_rec._C"), None
    except ModuleNotFoundError:
        return None, "npu_rec was installed without its C++ kernels (docs/devices.md)"
    except ImportError as error:  # built against another torch, say
        return None, f"npu_rec._C does not load ({error}); install npu_rec again for this torch"


def extension() -> Any:
    """The module `npu_rec._C`; None when `unusable` says so."""
    return _load()[0]


def instruction_set() -> str:
    """The fastest instruction set of this build and machine, or the one `NPU_REC_CPU_ISA` names.

    Raises:
        BackendError: the named one is not available.
    """
    usable: list[str] = extension().instruction_sets()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return usable[0]
    if wanted not in usable:
        raise BackendError(f"{ISA_VARIABLE}={wanted}: this machine and build have {', '.join(usable)}")
    return wanted


def usable_instruction_set() -> tuple[str | None, str | None]:
    """`instruction_set()`, or the reason why there is none; for `npu-rec doctor`."""
    reason = _load()[1]
    if reason is not None:
        return None, reason
    try:
        return instruction_set(), None
    except BackendError as error:
        return None, str(error)


def unusable(*tensors: torch.Tensor | None) -> str | None:
    """None when the compiled kernels take these tensors, or the reason why not.

    Raises:
        BackendError: `NPU_REC_CPU_ISA` names an instruction set that is not available. (As a mere reason it would
            send `auto` to a slower backend without a word.)
    """
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device.type}"
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the dtype is {tensor.dtype}"
    reason = _load()[1]
    if reason is None:
        instruction_set()
    return reason
