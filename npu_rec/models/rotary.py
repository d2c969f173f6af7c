"""Rotary position embedding (RoFormer, arXiv 2104.09864) of packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.errors import ConfigError
from npu_rec.models.backbone import Layout

Angles = tuple[Tensor, Tensor]
"""Cosines and sines `[T, D]` of a head of width D."""


def check_rotary(width: int) -> None:
    """Raise ConfigError unless a head of `width` channels can be turned in pairs."""
    if width % 2:
        raise ConfigError(f"model.attention_dim: rotary positions turn pairs of channels, {width} is odd")


def rotary_angles(layout: Layout, x: Tensor, width: int, base: float) -> Angles:
    """Angles `place * base^(-2i / width)` of channels i and i + width / 2, for the tokens x `[T, ...]`."""
    places = layout.positions(x.shape[0])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = torch.arange(0, width, 2, device=x.device, dtype=dtype) / width
    angles = places.to(dtype).unsqueeze(1) * base**-steps
    angles = torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()
