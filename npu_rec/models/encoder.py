"""Item ids in, one vector a token out: table, positions, backbone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from npu_rec.config import EmbeddingConfig, ModelConfig, OpsConfig
from npu_rec.distributed import World
from npu_rec.distributed.context import ContextShard
from npu_rec.distributed.world import ALONE
from npu_rec.embedding import TableSpec, build_tables
from npu_rec.models.backbone import Backbone, Layout
from npu_rec.ops import dropout
from npu_rec.registry import lookup

INPUT_DROPOUT = -1  # part of the dropout key; layers count from 0


class SequenceEncoder(nn.Module):
    """`x_i = dropout(E[id_i] * sqrt(D) + P[i])`, zero where id is 0, through the backbone.

    Equations of HSTU, arXiv 2402.17152, as in Meta's research code. With rows of another width E than the model's D
    (`embedding.dim`), `x_i = dropout(W_in E[id_i] * sqrt(E) + P[i])`, and the hidden states are `W_out h_i`.

    Attributes:
        tables: `items`, the rows `[num_items + 1, E]`, wherever they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: Any,
        ops: OpsConfig,
        *,
        num_items: int,
        seed: int,
        embedding: EmbeddingConfig | None = None,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        backbone = lookup("model", config.backbone).target
        self.max_seq_len = config.max_seq_len + config.max_output_len
        self.input_dropout, self.ops = config.input_dropout, ops
        embedding = embedding or EmbeddingConfig()
        width = embedding.dim or config.embedding_dim
        self.scale = width**0.5
        spec = TableSpec("items", num_items + 1, width, seed)
        self.tables = build_tables([spec], embedding, ops.embedding_lookup, world)
        self.items = self.tables.tables["items"]
        self.project_in = self.project_out = None
        if width != config.embedding_dim:
            self.project_in = _projection(width, config.embedding_dim)
            self.project_out = _projection(config.embedding_dim, width)
        self.positions: nn.Parameter | None = None
        if backbone.learned_positions:
            self.positions = nn.Parameter(torch.empty(self.max_seq_len, config.embedding_dim))
            backbone.reset_positions(self.positions, options)
        self.backbone: Backbone = backbone(config, options, ops)

    def forward(
        self,
        item_ids: Tensor,
        offsets: Tensor,
        times: Tensor | None = None,
        query_times: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        vectors: Tensor | None = None,
        context: ContextShard | None = None,
    ) -> Tensor:
        """Hidden states `[T, E]`, of the width of the rows.

        Args:
            item_ids: `[T]` int64; 0 is padding and yields a zero input.
            offsets: `[B + 1]` int64; no sequence longer than N.
            times, query_times: `[T]` int64 seconds of each event and of the one after it, or None.
            dropout_keys: `[T]` int64 in training, None otherwise.
            vectors: `[T, E]` rows of `item_ids`, looked up by a plan or read; None where this process has all rows.
            context: with context parallel, what the tokens given, and all the arguments, are of their sequences.
        """
        layout = Layout(offsets, self.max_seq_len, times, query_times, None, dropout_keys, context)
        x = self.inputs(self.items(item_ids) if vectors is None else vectors)
        return self.through(x, layout, item_ids != 0)

    def inputs(self, vectors: Tensor) -> Tensor:
        """Rows `[T, E]` as the model reads them, `[T, D]`."""
        x: Tensor = vectors * self.scale
        return x if self.project_in is None else cast(Tensor, self.project_in(x))

    def through(self, x: Tensor, layout: Layout, present: Tensor) -> Tensor:
        """Hidden states `[T, E]` of tokens `x [T, D]`, with places and dropout; zero input where not `present [T]`."""
        if self.positions is not None:
            x = x + self.positions[layout.positions(x.shape[0])]
        x = dropout(x, self.input_dropout, layout.keys_for(INPUT_DROPOUT), backend=self.ops.dropout)
        hidden: Tensor = self.backbone(x * present.unsqueeze(1), layout)
        return hidden if self.project_out is None else self.project_out(hidden)

    def encode(
        self, item_ids: Tensor, offsets: Tensor, times: Tensor | None = None, next_times: Tensor | None = None
    ) -> Tensor:
        """User vectors `[T, E]` of length 1, without dropout; arguments as in `forward`."""
        return unit(self(item_ids, offsets, times, next_times))

    def flops(self, lengths: Tensor) -> float:
        """Floating-point operations of one forward pass over sequences of `lengths [B]`."""
        maps = [m for m in (self.project_in, self.project_out) if m is not None]
        return self.backbone.flops(lengths) + sum(2.0 * m.weight.numel() for m in maps) * float(lengths.sum())


def _projection(width: int, to: int) -> nn.Linear:
    """A linear map that keeps the size of numbers."""
    linear = nn.Linear(width, to, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def unit(x: Tensor) -> Tensor:
    """`x [..., D]` over its length, at least 1e-6."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-6)
