"""One layer of HSTU in its two variants, with the parts that ablations change; equations in `npu_rec.models.hstu`."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from npu_rec.config import ModelConfig, OpsConfig, Section, refuse_idle
from npu_rec.distributed.context_attention import context_attention
from npu_rec.models.backbone import Layout
from npu_rec.models.norms import RMSNorm
from npu_rec.models.relative_bias import BUCKETS, BiasedAttention
from npu_rec.models.rotary import Angles
from npu_rec.ops import dropout, hstu_attention, linear_silu, norm_gate, rotary, softmax_attention
from npu_rec.ops.silu import silu

EPS = 1e-6
ABLATIONS = ("scores", "gate", "norm", "residual")


class HSTUOptions(Section):
    """`model.options` of `backbone: hstu`; those in `ABLATIONS` change what Meta's weights compute."""

    variant: Literal["research", "production"] = Field("research", description="Which of Meta's two layers.")
    bias: Literal["auto", "none", "position", "position_time", "rope"] = Field(
        "auto",
        description="Relative bias in attention, or rotary positions of queries and keys. `auto`: position_time in "
        "research, none in production.",
    )
    time_buckets: int = BUCKETS
    scores: Literal["silu", "softmax"] = Field(
        "silu",
        description="What is made of scores: `silu` over N, or `softmax`, with products over sqrt(attention_dim).",
    )
    gate: bool = Field(
        True, description="Multiply by u, element by element: the feature interaction. Without it u is not computed."
    )
    norm: Literal["layer", "rms"] = Field("layer", description="Both norms of a layer: LayerNorm or RMSNorm.")
    residual: Literal["pre", "post"] = Field(
        "pre", description="`pre`: x + layer(norm(x)). `post`: norm(x + layer(x)), as in the first Transformer."
    )

    @model_validator(mode="after")
    def _consistent(self) -> HSTUOptions:
        refuse_idle(self, {"time_buckets": self.kind_of_bias != "position_time" and f"bias is {self.kind_of_bias}"})
        return self

    @property
    def ablations(self) -> list[str]:
        """Names of `ABLATIONS` that are not as in Meta's code."""
        return [name for name in ABLATIONS if getattr(self, name) != HSTUOptions.model_fields[name].default]

    @property
    def kind_of_bias(self) -> str:
        """`bias` without `auto`."""
        automatic = "none" if self.variant == "production" else "position_time"
        return automatic if self.bias == "auto" else self.bias


class HSTULayer(BiasedAttention):
    """One layer; `x [T, D]` -> `[T, D]`."""

    def __init__(self, config: ModelConfig, options: HSTUOptions, ops: OpsConfig, index: int) -> None:
        super().__init__()
        self.production = options.variant == "production"
        self.softmax, self.gated, self.post_norm = options.scores == "softmax", options.gate, options.residual == "post"
        self.index, self.ops, self.dropout = index, ops, config.dropout
        self.heads, self.attention_dim, self.linear_dim = config.num_heads, config.attention_dim, config.linear_dim
        width, inner = config.embedding_dim, config.num_heads * config.linear_dim
        narrow = config.num_heads * config.attention_dim
        self.widths = [inner if self.gated else 0, inner, narrow, narrow]
        self.input_norm, self.output_norm = (self._norm(size, options.norm) for size in (width, inner))
        self.uvqk = nn.Linear(width, sum(self.widths), bias=self.production)
        parts = 3 if self.production and self.gated else 1
        self.output = nn.Linear(inner * parts, width, bias=not self.production)
        self.add_bias(config, "none" if options.kind_of_bias == "rope" else options.kind_of_bias, options.time_buckets)
        self.reset_parameters()

    def _norm(self, width: int, kind: str) -> nn.Module:
        if kind == "rms":
            return RMSNorm(width, EPS, affine=self.production, backend=self.ops.rms_norm)
        return nn.LayerNorm(width, EPS, elementwise_affine=self.production)

    def reset_parameters(self) -> None:
        """Initial values as in Meta's code."""
        if self.production:
            nn.init.xavier_uniform_(self.uvqk.weight)
            nn.init.zeros_(self.uvqk.bias)
        else:
            nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        self.reset_bias()

    def forward(self, x: Tensor, layout: Layout, angles: Angles | None = None) -> Tensor:
        if self.post_norm:
            y: Tensor = self.input_norm(x + self._update(x, layout, angles))
            return y
        return self._update(self.input_norm(x), layout, angles) + x

    def _update(self, x: Tensor, layout: Layout, angles: Angles | None) -> Tensor:
        """What the layer adds to the residual stream, `[T, D]`."""
        if self.production:
            u, v, q, k = torch.split(self.uvqk(x), self.widths, dim=1)
            u = silu(u)
        else:
            u, v, q, k = linear_silu(x, self.uvqk.weight, splits=self.widths, backend=self.ops.linear_silu)
        q, k = q.view(-1, self.heads, self.attention_dim), k.view(-1, self.heads, self.attention_dim)
        if angles is not None:
            q, k = (rotary(side, *angles, backend=self.ops.rotary) for side in (q, k))
        attended = self._attention(q, k, v.view(-1, self.heads, self.linear_dim), layout).flatten(1)
        out: Tensor = self.output(self._gated(attended, u, layout.keys_for(self.index)))
        return out

    def _gated(self, attended: Tensor, u: Tensor, keys: Tensor | None) -> Tensor:
        """The attended values `[T, H d_v]` normalised, with `u` (`[T, 0]` without the gate), and dropped."""
        if self.gated and not self.production and isinstance(self.output_norm, nn.LayerNorm):
            return norm_gate(attended, u, eps=EPS, dropout=self.dropout, dropout_keys=keys, backend=self.ops.norm_gate)
        normalised = self.output_norm(attended)
        if self.gated:
            product = u * normalised
            normalised = torch.cat([u, normalised, product], 1) if self.production else product
        return dropout(normalised, self.dropout, keys, backend=self.ops.dropout)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        common: dict[str, Any] = {
            "max_seq_len": layout.max_seq_len,
            "num_targets": layout.num_targets,
            "bias": self.relative_bias(layout),
        }
        if layout.context is None:
            common["contextual_seq_len"] = layout.contextual_seq_len
        if self.softmax:
            return softmax_attention(q, k, v, layout.offsets, backend=self.ops.softmax_attention, **common)
        silu_attention = partial(
            hstu_attention if layout.context is None else context_attention,
            alpha=self.attention_dim**-0.5 if self.production else 1.0,
            backend=self.ops.hstu_attention,
            **common,
        )
        return silu_attention(q, k, v, layout.offsets if layout.context is None else layout.context)
