"""HSTU, hierarchical sequential transduction units (arXiv 2402.17152), one implementation, two variants.

`research`, the retrieval experiments of the paper as coded by Meta:

    u, v, q, k = split(silu(LN(x) W))                          no affine, no bias, no 1/sqrt(d)
    O  = silu(q k^T + position bias + time bias) / N * mask @ v
    y  = W_o dropout(LN(O) * u) + b_o + x

`production`, the ranking model (DLRM-HSTU): affine norms, a bias on the projection, SiLU on u alone,
alpha = 1/sqrt(d_qk), no relative bias inside attention, time added once at the input (positions stay those of
research, by place from the start: Meta counts from the end of the history, which training on every next item
would let see the end), and `y = W_o dropout([u, a, u * a]) + x` with a = LN(O) and no bias.

Ablations (arXiv 2412.00714) are options that each change one part of either variant:

- `bias`: position alone, none, or rotary positions (no tables; learned places stay, as in every other case).
- `scores: softmax`: `softmax(q k^T / sqrt(d_qk) + bias) @ v`, and no 1/N.
- `gate: false`: no product with u. That product is what the paper calls feature interaction, so this is its ablation
  without it; u, whose one use it is, is not computed (in `production`, y = W_o dropout(a) + x).
- `norm: rms`: RMSNorm for both norms, with weights where the variant has them.
- `residual: post`: y = LN(x + W_o ...), with u, v, q, k = split(silu(x W)) of x as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.models.backbone import Layout
from npu_rec.models.hstu_layer import HSTULayer
from npu_rec.models.hstu_layer import HSTUOptions as HSTUOptions
from npu_rec.models.meta_weights import load_meta_state_dict as load_meta_state_dict
from npu_rec.models.rotary import check_rotary, rotary_angles
from npu_rec.models.stack import Stack
from npu_rec.registry import register

ROPE_BASE = 10000.0


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
class HSTU(Stack):
    """A stack of HSTU layers."""

    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        super().__init__(config, options, ops)
        self.ablations: list[str] = options.ablations
        self.rotary = options.kind_of_bias == "rope"
        self.takes_context = options.scores == "silu" and not self.rotary
        production = options.variant == "production"
        self.input_times = InputTimes(config.embedding_dim) if production else None
        self.layers = nn.ModuleList(HSTULayer(config, options, ops, i) for i in range(config.num_blocks))

    @classmethod
    def check(cls, config: ModelConfig, options: Any) -> None:
        if options.kind_of_bias == "rope":
            check_rotary(config.attention_dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.input_times is not None:
            x = self.input_times(x, layout)
        if not self.rotary:
            return self.run(x, layout)
        return self.run(x, layout, rotary_angles(layout, x, self.config.attention_dim, ROPE_BASE))


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
