"""SASRec (arXiv 1808.09781), as its authors built it and as Meta's research repository has it as a baseline.

    q = LayerNorm(x);  x = q + W_o attention(q, k, v) + b_o      keys and values are projections of x itself
    x = LayerNorm(x);  x = x + dropout(W_2 dropout(relu(W_1 x + b_1)) + b_2)
    y = LayerNorm(x) after the last block                        `original` alone

`original` has affine norms and that last one; in `meta` norms have no weights. Attention weights are dropped too.
Matrices start from Xavier normal, q, k and v as one; positions from Xavier normal, in `meta` from N(0, 1/D), cut at
two deviations.

With `residual: llama` both branches are pre-norm: x = x + attention(LayerNorm(x)), x = x + feed_forward(LayerNorm(x)),
and there is a last norm in either variant. Together with `bias: position_time` this is the enhanced SASRec of Scaling
New Frontiers (arXiv 2412.00714).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.models.backbone import Layout
from npu_rec.models.relative_bias import BiasOptions
from npu_rec.models.self_attention import SelfAttention
from npu_rec.models.stack import Stack
from npu_rec.ops import dropout
from npu_rec.registry import register

EPS = 1e-8


class SASRecOptions(BiasOptions):
    """`model.options` of `backbone: sasrec`."""

    variant: Literal["meta", "original"] = Field(
        "meta", description="`original`: affine norms and a last one. `meta`: the baseline of Meta's repository."
    )
    residual: Literal["original", "llama"] = Field(
        "original", description="`original`: the normalised input goes past a branch. `llama`: pre-norm, x itself does."
    )


class SASRecLayer(nn.Module):
    """One block; `x [T, D]` -> `[T, D]`."""

    def __init__(self, config: ModelConfig, options: SASRecOptions, ops: OpsConfig, index: int) -> None:
        super().__init__()
        self.part, self.ops, self.dropout = 3 * index, ops, config.dropout
        self.pre_norm = options.residual == "llama"
        width, affine = config.embedding_dim, options.variant == "original"
        self.attention_norm = nn.LayerNorm(width, EPS, elementwise_affine=affine)
        self.attention = SelfAttention(config, options, ops, affine=True)
        self.feed_forward_norm = nn.LayerNorm(width, EPS, elementwise_affine=affine)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        for linear in (self.attention.qkv, self.attention.output, self.inner, self.outer):
            nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(self.attention.qkv.bias)
        nn.init.zeros_(self.attention.output.bias)
        self.attention.reset_bias()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        normalised = self.attention_norm(x)
        if self.pre_norm:
            x = x + self.attention(normalised, normalised, layout, self.part)
            return x + self._feed_forward(self.feed_forward_norm(x), layout)
        x = self.feed_forward_norm(normalised + self.attention(normalised, x, layout, self.part))
        return x + self._feed_forward(x, layout)

    def _feed_forward(self, x: Tensor, layout: Layout) -> Tensor:
        hidden = self.inner(x).relu()
        hidden = dropout(hidden, self.dropout, layout.keys_for(self.part + 1), backend=self.ops.dropout)
        return dropout(self.outer(hidden), self.dropout, layout.keys_for(self.part + 2), backend=self.ops.dropout)


@register("model", "sasrec", options=SASRecOptions)
class SASRec(Stack):
    """A stack of SASRec blocks."""

    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        super().__init__(config, options, ops)
        self.layers = nn.ModuleList(SASRecLayer(config, options, ops, i) for i in range(config.num_blocks))
        affine = options.variant == "original"
        ends = affine or options.residual == "llama"
        self.norm = nn.LayerNorm(config.embedding_dim, EPS, elementwise_affine=affine) if ends else nn.Identity()

    @staticmethod
    def reset_positions(positions: Tensor, options: Any) -> None:
        if options.variant == "original":
            nn.init.xavier_normal_(positions)
        else:
            std = positions.shape[1] ** -0.5
            nn.init.trunc_normal_(positions, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        out: Tensor = self.norm(self.run(x, layout))
        return out
