"""GPT as GPT-2 (Radford et al. 2019): LayerNorm before each branch, learned positions, a GELU MLP of four times D.

    x = x + dropout(W_o attention(q, k, v) + b_o)          q, k, v = W LayerNorm(x) + b
    x = x + dropout(W_2 gelu(W_1 LayerNorm(x) + b_1) + b_2)
    y = LayerNorm(x) after the last block

Weights start from N(0, 0.02^2), those that add to the residual stream divided by sqrt(2 * num_blocks), positions from
N(0, 0.02^2), bias vectors from 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.models.backbone import Layout
from npu_rec.models.relative_bias import BiasOptions
from npu_rec.models.self_attention import SelfAttention
from npu_rec.models.stack import Stack
from npu_rec.ops import dropout
from npu_rec.registry import register

EPS = 1e-5
STD = 0.02


class GPTOptions(BiasOptions):
    """`model.options` of `backbone: gpt`."""


class GPTLayer(nn.Module):
    """One block; `x [T, D]` -> `[T, D]`."""

    def __init__(self, config: ModelConfig, options: GPTOptions, ops: OpsConfig, index: int) -> None:
        super().__init__()
        self.part, self.ops, self.dropout = 3 * index, ops, config.dropout
        width = config.embedding_dim
        self.attention_norm = nn.LayerNorm(width, EPS)
        self.attention = SelfAttention(config, options, ops, affine=True)
        self.feed_forward_norm = nn.LayerNorm(width, EPS)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.reset_parameters((2 * config.num_blocks) ** -0.5)

    def reset_parameters(self, shrink: float) -> None:
        """Initial values; `shrink` is for the projections that add to the residual stream."""
        for linear in (self.attention.qkv, self.inner):
            nn.init.normal_(linear.weight, std=STD)
        for linear in (self.attention.output, self.outer):
            nn.init.normal_(linear.weight, std=STD * shrink)
        for linear in (self.attention.qkv, self.inner, self.attention.output, self.outer):
            nn.init.zeros_(linear.bias)
        self.attention.reset_bias()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        normalised = self.attention_norm(x)
        attended = self.attention(normalised, normalised, layout, self.part)
        x = x + dropout(attended, self.dropout, layout.keys_for(self.part + 1), backend=self.ops.dropout)
        hidden = gelu(self.inner(self.feed_forward_norm(x)), approximate="tanh")
        return x + dropout(self.outer(hidden), self.dropout, layout.keys_for(self.part + 2), backend=self.ops.dropout)


@register("model", "gpt", options=GPTOptions)
class GPT(Stack):
    """A stack of GPT blocks."""

    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        super().__init__(config, options, ops)
        self.layers = nn.ModuleList(GPTLayer(config, options, ops, i) for i in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.embedding_dim, EPS)

    @staticmethod
    def reset_positions(positions: Tensor, options: Any) -> None:
        nn.init.normal_(positions, std=STD)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        out: Tensor = self.norm(self.run(x, layout))
        return out
