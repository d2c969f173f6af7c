"""HSTU, hierarchical sequential transduction units (arXiv 2402.17152), one implementation, two variants.

`research`, the retrieval experiments of the paper as coded by Meta:

    u, v, q, k = split(silu(LN(x) W))                          no affine, no bias, no 1/sqrt(d)
    O  = silu(q k^T + position bias + time bias) / N * mask @ v
    y  = W_o dropout(LN(O) * u) + b_o + x

`production`, the ranking model (DLRM-HSTU): affine norms, a bias on the projection, SiLU on u alone,
alpha = 1/sqrt(d_qk), no relative bias inside attention, time added once at the input (positions stay those of
research, by place from the start: Meta counts from the end of the history, which training on every next item
would let see the end), and `y = W_o dropout([u, a, u * a]) + x` with a = LN(O) and no bias.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from npu_rec.config import ModelConfig, OpsConfig, Section
from npu_rec.distributed.context_attention import context_attention
from npu_rec.models.backbone import Backbone, Layout
from npu_rec.models.meta_weights import load_meta_state_dict as load_meta_state_dict
from npu_rec.ops import RelativeBias, hstu_attention, linear_silu, norm_gate
from npu_rec.ops.random import dropout
from npu_rec.ops.silu import silu
from npu_rec.registry import register

EPS = 1e-6


class HSTUOptions(Section):
    """`model.options` of `backbone: hstu`."""

    variant: Literal["research", "production"] = Field("research", description="Which of Meta's two layers.")
    bias: Literal["auto", "none", "position", "position_time"] = Field(
        "auto", description="Relative bias in attention. `auto`: position_time in research, none in production."
    )
    time_buckets: int = Field(128, ge=1, le=144, description="Logarithmic buckets of the relative time bias.")


class HSTULayer(nn.Module):
    """One layer; `x [T, D]` -> `[T, D]`."""

    def __init__(self, config: ModelConfig, options: HSTUOptions, ops: OpsConfig, index: int) -> None:
        super().__init__()
        self.production = options.variant == "production"
        self.index, self.ops, self.dropout = index, ops, config.dropout
        self.heads, self.attention_dim, self.linear_dim = config.num_heads, config.attention_dim, config.linear_dim
        width, inner = config.embedding_dim, config.num_heads * config.linear_dim
        self.widths = [inner, inner, config.num_heads * config.attention_dim, config.num_heads * config.attention_dim]
        self.input_norm = nn.LayerNorm(width, EPS, elementwise_affine=self.production)
        self.output_norm = nn.LayerNorm(inner, EPS, elementwise_affine=self.production)
        self.uvqk = nn.Linear(width, sum(self.widths), bias=self.production)
        self.output = nn.Linear(inner * (3 if self.production else 1), width, bias=not self.production)
        self.position_weight = self.time_weight = None
        bias = "none" if self.production else "position_time"
        bias = bias if options.bias == "auto" else options.bias
        if bias != "none":
            self.position_weight = nn.Parameter(torch.empty(2 * (config.max_seq_len + config.max_output_len) - 1))
        if bias == "position_time":
            self.time_weight = nn.Parameter(torch.empty(options.time_buckets + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as in Meta's code."""
        if self.production:
            nn.init.xavier_uniform_(self.uvqk.weight)
            nn.init.zeros_(self.uvqk.bias)
        else:
            nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        for table in (self.position_weight, self.time_weight):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        normalised = self.input_norm(x)
        if self.production:
            u, v, q, k = torch.split(self.uvqk(normalised), self.widths, dim=1)
        else:
            u, v, q, k = linear_silu(normalised, self.uvqk.weight, splits=self.widths, backend=self.ops.linear_silu)
        attended = self._attention(
            q.view(-1, self.heads, self.attention_dim),
            k.view(-1, self.heads, self.attention_dim),
            v.view(-1, self.heads, self.linear_dim),
            layout,
        ).flatten(1)
        keys = layout.keys_for(self.index)
        if self.production:
            u, normalised = silu(u), self.output_norm(attended)
            gated = dropout(torch.cat([u, normalised, u * normalised], 1), self.dropout, keys)
        else:
            gated = norm_gate(attended, u, eps=EPS, dropout=self.dropout, dropout_keys=keys, backend=self.ops.norm_gate)
        y: Tensor = self.output(gated) + x
        return y

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        arguments: dict[str, Any] = {
            "max_seq_len": layout.max_seq_len,
            "alpha": self.attention_dim**-0.5 if self.production else 1.0,
            "num_targets": layout.num_targets,
            "bias": self._bias(layout),
            "backend": self.ops.hstu_attention,
        }
        if layout.context is not None:
            return context_attention(q, k, v, layout.context, **arguments)
        return hstu_attention(q, k, v, layout.offsets, **arguments)

    def _bias(self, layout: Layout) -> RelativeBias | None:
        if self.position_weight is None:
            return None
        if self.time_weight is None:
            return RelativeBias(self.position_weight)
        return RelativeBias(self.position_weight, self.time_weight, layout.query_times, layout.key_times)


class InputTimes(nn.Module):
    """Time at the input, production variant: `x + P[bucket]`, bucket = trunc(sqrt(max(t_query - t, 1e-6) / 60 s)).

    t_query is the time of the next event, of the request for the last one, as for the relative bias.
    """

    ROWS = 2049

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(self.ROWS, width))
        nn.init.uniform_(self.weight, -(self.ROWS**-0.5), self.ROWS**-0.5)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`x [T, D]` -> `[T, D]`; data without times passes unchanged."""
        if layout.times is None or layout.query_times is None:
            return x
        minutes = (layout.query_times - layout.times).to(torch.float32).clamp_min(1e-6) / 60.0
        bucket = minutes.sqrt().to(torch.int64).clamp_max(self.ROWS - 1)
        return x + self.weight[bucket]


@register("model", "hstu", options=HSTUOptions)
class HSTU(Backbone):
    """A stack of HSTU layers."""

    takes_context: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        super().__init__(config, options, ops)
        self.config = config
        self.recompute = False
        production = options.variant == "production"
        self.input_times = InputTimes(config.embedding_dim) if production else None
        self.layers = nn.ModuleList(HSTULayer(config, options, ops, i) for i in range(config.num_blocks))

    @property
    def needs_times(self) -> bool:
        return any(layer.time_weight is not None for layer in self.layers)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.input_times is not None:
            x = self.input_times(x, layout)
        for layer in self.layers:
            x = (
                checkpoint(layer, x, layout, use_reentrant=False)
                if self.recompute and self.training
                else layer(x, layout)
            )
        return x

    def flops(self, lengths: Tensor) -> float:
        dense = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pairs = float((lengths.double() * (lengths + 1) / 2).sum())
        attention = 2 * self.config.num_heads * (self.config.attention_dim + self.config.linear_dim)
        return dense * float(lengths.sum()) + self.config.num_blocks * attention * pairs


def build_research_hstu(
    *,
    num_items: int,
    embedding_dim: int,
    num_blocks: int,
    num_heads: int,
    linear_dim: int,
    attention_dim: int,
    max_sequence_len: int,
    max_output_len: int,
    seed: int = 0,
) -> nn.Module:
    """Research HSTU without the trainer around it.

    Args:
        num_items: the largest item id; the table has one row more.
        max_sequence_len, max_output_len: N is their sum (Meta passes gr_output_length + 1 as the latter).

    Returns:
        A `SequenceEncoder`; its `encode(item_ids [T], offsets [B + 1], times [T], next_times [T])` gives
        user vectors `[T, D]` of length 1. Load Meta's weights with `load_meta_state_dict`.
    """
    from npu_rec.models.encoder import SequenceEncoder  # the encoder looks backbones up by name

    config = ModelConfig(
        embedding_dim=embedding_dim,
        num_blocks=num_blocks,
        num_heads=num_heads,
        linear_dim=linear_dim,
        attention_dim=attention_dim,
        max_seq_len=max_sequence_len,
        max_output_len=max_output_len,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceEncoder(config, HSTUOptions(), OpsConfig(), num_items=num_items, seed=seed)
