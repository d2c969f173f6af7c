"""What every operator asks of its arguments, whichever backend runs it: types, dtypes, one device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_ACCEPTED: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool, torch.SymBool), "True or False"),
    int: ((int, np.integer, torch.SymInt), "an integer"),
    float: ((float, int, np.floating, np.integer, torch.SymFloat, torch.SymInt), "a number"),
    str: ((str,), "a string"),
}


def check_tensors(
    *, floats: dict[str, Tensor | None], indices: dict[str, Tensor | None], optional: tuple[str, ...] = ()
) -> None:
    """Raise TypeError for what is no tensor, ValueError for another dtype and for tensors on several devices.

    Args:
        floats: by name, what must be float64, float32, bfloat16 or float16.
        indices: by name, what must be int64.
        optional: names of those that may be None.
    """
    first: str | None = None
    device: torch.device | None = None
    for tensors, allowed in ((floats, FLOATS), (indices, (torch.int64,))):
        for name, tensor in tensors.items():
            if tensor is None and name in optional:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in allowed:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
            if device is None:
                first, device = name, tensor.device
            elif tensor.device != device:
                raise ValueError(
                    f"all tensors must be on one device: {first} is on {device}, {name} on {tensor.device}"
                )


def check_constants(**constants: tuple[object, type]) -> None:
    """Raise TypeError unless each value, given with bool, int, float or str, is one; a float may be an int."""
    for name, (value, kind) in constants.items():
        accepted, words = _ACCEPTED[kind]
        if not isinstance(value, accepted):
            raise TypeError(f"{name} must be {words}, got {value!r}")
