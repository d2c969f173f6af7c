"""Multi-head softmax attention over packed tokens, of the blocks of Llama, GPT and SASRec."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.models.backbone import Layout
from npu_rec.models.relative_bias import BiasedAttention, BiasOptions
from npu_rec.models.rotary import Angles
from npu_rec.ops import rotary, softmax_attention


class SelfAttention(BiasedAttention):
    """`W_o concat_h(dropout(softmax(q_h k_h^T / sqrt(d_qk) + relative bias)) v_h)`, causal, targets apart.

    Attributes:
        qkv: all projections, `[H (2 d_qk + d_v), D]`, in this order.
    """

    def __init__(self, config: ModelConfig, options: BiasOptions, ops: OpsConfig, *, affine: bool) -> None:
        """`affine`: the projections have a bias vector."""
        super().__init__()
        self.heads, self.ops, self.dropout = config.num_heads, ops, config.dropout
        narrow, inner = config.num_heads * config.attention_dim, config.num_heads * config.linear_dim
        self.widths = [narrow, narrow, inner]
        self.qkv = nn.Linear(config.embedding_dim, sum(self.widths), bias=affine)
        self.output = nn.Linear(inner, config.embedding_dim, bias=affine)
        self.add_bias(config, options.bias, options.time_buckets)

    def forward(self, queries: Tensor, keys: Tensor, layout: Layout, part: int, angles: Angles | None = None) -> Tensor:
        """`[T, D]`.

        Args:
            queries, keys: `[T, D]`, what queries, and what keys and values are projections of; may be one tensor.
            part: of the dropout key.
            angles: of rotary positions, or None.
        """
        if queries is keys:
            q, k, v = self.qkv(keys).split(self.widths, 1)
        else:
            weight, bias, own = self.qkv.weight, self.qkv.bias, self.widths[0]
            q = linear(queries, weight[:own], None if bias is None else bias[:own])
            k, v = linear(keys, weight[own:], None if bias is None else bias[own:]).split(self.widths[1:], 1)
        q, k, v = (x.unflatten(1, (self.heads, -1)) for x in (q, k, v))
        if angles is not None:
            q, k = (rotary(x, *angles, backend=self.ops.rotary) for x in (q, k))
        attended = softmax_attention(
            q,
            k,
            v,
            layout.offsets,
            max_seq_len=layout.max_seq_len,
            num_targets=layout.num_targets,
            contextual_seq_len=layout.contextual_seq_len,
            bias=self.relative_bias(layout),
            dropout=self.dropout,
            dropout_keys=layout.keys_for(part),
            backend=self.ops.softmax_attention,
        )
        out: Tensor = self.output(attended.flatten(1))
        return out
