"""SiLU on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`; bfloat16 in float32, because Ascend's own operator takes float32 and float16 only."""
    return functional.silu(x.float()).to(x.dtype) if x.dtype == torch.bfloat16 else functional.silu(x)
