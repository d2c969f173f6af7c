"""Backbones that are blocks one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.models.backbone import Backbone, Layout
from npu_rec.models.relative_bias import BiasedAttention


class Stack(Backbone):
    """`self.layers`, each a map of `x [T, D]`, the layout and `more` to `[T, D]`.

    Attributes:
        recompute: in training keep no activations of a layer but its input.
    """

    layers: nn.ModuleList

    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        super().__init__(config, options, ops)
        self.config = config
        self.recompute = False

    @property
    def needs_times(self) -> bool:
        return any(isinstance(m, BiasedAttention) and m.time_weight is not None for m in self.modules())

    def run(self, x: Tensor, layout: Layout, *more: Any) -> Tensor:
        """`x [T, D]` through all layers."""
        for layer in self.layers:
            x = (
                checkpoint(layer, x, layout, *more, use_reentrant=False)
                if self.recompute and self.training
                else layer(x, layout, *more)
            )
        return x

    def flops(self, lengths: Tensor) -> float:
        dense = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pairs = float((lengths.double() * (lengths + 1) / 2).sum())
        attention = 2 * self.config.num_heads * (self.config.attention_dim + self.config.linear_dim)
        return dense * float(lengths.sum()) + self.config.num_blocks * attention * pairs
