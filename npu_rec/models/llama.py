"""Llama (arXiv 2302.13971): RMSNorm before each branch, rotary positions, SwiGLU, no bias vectors.

    x = x + W_o attention(rotary(q), rotary(k), v)         q, k, v = W RMSNorm(x)
    x = x + W_2 (silu(a) * b)                              a, b = W_1 RMSNorm(x)
    y = RMSNorm(x) after the last block

Weights start from N(0, 0.02^2). Llama was published without dropout; `model.dropout` applies where GPT has it: to the
attention weights and to what each branch adds.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.models.backbone import Layout
from npu_rec.models.norms import RMSNorm
from npu_rec.models.relative_bias import BiasOptions
from npu_rec.models.rotary import Angles, check_rotary, rotary_angles
from npu_rec.models.self_attention import SelfAttention
from npu_rec.models.stack import Stack
from npu_rec.ops import dropout, swiglu
from npu_rec.registry import register

EPS = 1e-6
MULTIPLE = 32  # of the hidden width


class LlamaOptions(BiasOptions):
    """`model.options` of `backbone: llama`."""

    hidden_dim: int | None = Field(
        None, ge=1, description="Width of the SwiGLU; unset: 8/3 of embedding_dim, rounded up to a multiple of 32."
    )
    rope_base: float = Field(10000.0, gt=1, description="Base of the wavelengths of rotary positions.")


class LlamaLayer(nn.Module):
    """One block; `x [T, D]` -> `[T, D]`."""

    def __init__(self, config: ModelConfig, options: LlamaOptions, ops: OpsConfig, index: int) -> None:
        super().__init__()
        self.part, self.ops, self.dropout = 3 * index, ops, config.dropout
        width = config.embedding_dim
        hidden = options.hidden_dim or -(-(8 * width // 3) // MULTIPLE) * MULTIPLE
        self.attention_norm = RMSNorm(width, EPS, backend=ops.rms_norm)
        self.attention = SelfAttention(config, options, ops, affine=False)
        self.feed_forward_norm = RMSNorm(width, EPS, backend=ops.rms_norm)
        self.inner = nn.Linear(width, 2 * hidden, bias=False)
        self.outer = nn.Linear(hidden, width, bias=False)
        for linear in (self.attention.qkv, self.attention.output, self.inner, self.outer):
            nn.init.normal_(linear.weight, std=0.02)
        self.attention.reset_bias()

    def forward(self, x: Tensor, layout: Layout, angles: Angles) -> Tensor:
        normalised = self.attention_norm(x)
        attended = self.attention(normalised, normalised, layout, self.part, angles)
        x = x + dropout(attended, self.dropout, layout.keys_for(self.part + 1), backend=self.ops.dropout)
        hidden = swiglu(self.inner(self.feed_forward_norm(x)), backend=self.ops.swiglu)
        return x + dropout(self.outer(hidden), self.dropout, layout.keys_for(self.part + 2), backend=self.ops.dropout)


@register("model", "llama", options=LlamaOptions)
class Llama(Stack):
    """A stack of Llama blocks."""

    learned_positions: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        super().__init__(config, options, ops)
        self.rope_base: float = options.rope_base
        self.layers = nn.ModuleList(LlamaLayer(config, options, ops, i) for i in range(config.num_blocks))
        self.norm = RMSNorm(config.embedding_dim, EPS, backend=ops.rms_norm)

    @classmethod
    def check(cls, config: ModelConfig, options: Any) -> None:
        check_rotary(config.attention_dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        angles = rotary_angles(layout, x, self.config.attention_dim, self.rope_base)
        out: Tensor = self.norm(self.run(x, layout, angles))
        return out
