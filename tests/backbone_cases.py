"""Backbones with their options, random batches, and padded oracles `[B, N, D]` in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from strategies import generator, normal
from torch import Tensor, nn
from torch.nn.functional import (
    gelu,
    layer_norm,
    linear,
    multi_head_attention_forward,
    scaled_dot_product_attention,
    silu,
)

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.models import Layout, SequenceEncoder
from npu_rec.models.backbone import Backbone
from npu_rec.ops.jagged import jagged_to_padded, lengths_to_offsets
from npu_rec.ops.time_buckets import time_bucket_reference
from npu_rec.registry import lookup

ITEMS = 30
CONFIG = ModelConfig(
    embedding_dim=12, num_blocks=2, num_heads=2, attention_dim=6, linear_dim=6, dropout=0.3, max_seq_len=17,
    max_output_len=3,
)  # fmt: skip
N = 20


@dataclass(frozen=True)
class Case:
    """A backbone and its options."""

    backbone: str
    options: tuple[tuple[str, Any], ...]

    @property
    def schema(self) -> Any:
        return lookup("model", self.backbone).options(**dict(self.options))

    def build(self, seed: int = 0, config: ModelConfig = CONFIG) -> Backbone:
        """In float64, every weight random, those of norms around 1."""
        model: Backbone = lookup("model", self.backbone).target(config, self.schema, OpsConfig())
        return randomised(model.double(), seed)

    def encoder(self, config: ModelConfig = CONFIG) -> SequenceEncoder:
        config = config.model_copy(update={"backbone": self.backbone})
        return randomised(SequenceEncoder(config, self.schema, OpsConfig(), num_items=ITEMS, seed=0).double(), 1)


def randomised(model: Any, seed: int) -> Any:
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(normal(g, *parameter.shape, scale=0.4) + (1.0 if "norm.weight" in name else 0.0))
    return model


def case(backbone: str, **options: Any) -> Case:
    return Case(backbone, tuple(options.items()))


CASES = {
    f"{c.backbone} {' '.join(str(value) for _, value in c.options)}".strip(): c
    for c in (
        case("llama"),
        case("llama", bias="position"),
        case("llama", bias="position_time", hidden_dim=7, rope_base=50.0),
        case("gpt"),
        case("gpt", bias="position_time", time_buckets=30),
        case("sasrec"),
        case("sasrec", variant="original"),
        case("sasrec", residual="llama"),
        case("sasrec", variant="original", residual="llama", bias="position_time"),
        case("sasrec", bias="position"),
        *(
            case("hstu", **variant, **ablation)
            for variant in ({}, {"variant": "production"})
            for ablation in (
                {},
                {"bias": "none"},
                {"bias": "position"},
                {"bias": "position_time"},
                {"bias": "rope"},
                {"scores": "softmax"},
                {"gate": False},
                {"norm": "rms"},
                {"residual": "post"},
                {"bias": "rope", "scores": "softmax", "gate": False, "norm": "rms", "residual": "post"},
            )
        ),
    )
}


@dataclass(frozen=True)
class Batch:
    """Sequences of `lengths`, of which the last `targets` are candidates; x `[T, D]`."""

    lengths: tuple[int, ...]
    x: Tensor
    times: Tensor
    query_times: Tensor
    targets: tuple[int, ...] | None = None

    @staticmethod
    def random(*lengths: int, targets: tuple[int, ...] | None = None, seed: int = 5) -> Batch:
        g, total = generator(seed), sum(lengths)
        times = (torch.rand(total, generator=g) * 14).exp().long().cumsum(0)
        return Batch(
            lengths, normal(g, total, 12).double(), times, torch.cat([times[1:], times[-1:]]), targets
        )  # fmt: skip

    @property
    def offsets(self) -> Tensor:
        return lengths_to_offsets(torch.tensor(self.lengths, dtype=torch.int64))

    def layout(self, keys: Tensor | None = None) -> Layout:
        targets = None if self.targets is None else torch.tensor(self.targets)
        return Layout(self.offsets, N, self.times, self.query_times, targets, keys)

    def part(self, row: int) -> Batch:
        own = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        targets = None if self.targets is None else (self.targets[row],)
        return Batch((self.lengths[row],), self.x[own], self.times[own], self.query_times[own], targets)

    # --- padded to [B, N, ...]

    def pad(self, values: Tensor) -> Tensor:
        return jagged_to_padded(values, self.offsets, N)

    @property
    def history(self) -> Tensor:
        return (torch.tensor(self.lengths) - torch.tensor(self.targets or [0] * len(self.lengths))).view(-1, 1, 1)

    @property
    def places(self) -> Tensor:
        """`[B, N]`: one place for all targets."""
        places = torch.arange(N).expand(len(self.lengths), N)
        return places if self.targets is None else torch.minimum(places, self.history.squeeze(2))

    @property
    def mask(self) -> Tensor:
        """`[B, N, N]`: history, and itself."""
        i, j = torch.arange(N).view(-1, 1), torch.arange(N)
        return (i == j) | ((j < i) & (j < self.history))

    def bias(self, layer: nn.Module) -> Tensor:
        """`[B, N, N]` from the tables of a layer, 0 without."""
        total = torch.zeros(len(self.lengths), N, N, dtype=torch.float64)
        if layer.position_weight is not None:
            total = total + layer.position_weight[N - 1 + self.places[:, None, :] - self.places[:, :, None]]
        if layer.time_weight is not None:
            delta = self.pad(self.query_times)[:, :, None] - self.pad(self.times)[:, None, :]
            total = total + layer.time_weight[time_bucket_reference(delta, len(layer.time_weight) - 1)]
        return total

    def turned(self, x: Tensor, base: float) -> Tensor:
        """Rotary positions by complex numbers, `x [B, N, H, D]`."""
        half = x.shape[3] // 2
        angle = self.places[..., None] * torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
        number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
        return torch.cat([number.real, number.imag], 3)


# --- the oracles: padded [B, N, D], plain PyTorch


def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """PyTorch's softmax attention of `[B, N, H, D]` with the bias as a mask; `[B, N, H * D]`."""
    scores = batch.bias(layer).masked_fill(~batch.mask, -math.inf).unsqueeze(1)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, attn_mask=scores).transpose(1, 2).flatten(2)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, 6))


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def llama_oracle(model: Any, options: Any, x: Tensor, batch: Batch) -> Tensor:
    for layer in model.layers:
        q, k, v = (
            heads_of(y) for y in (rms(x, layer.attention_norm.weight) @ layer.attention.qkv.weight.T).chunk(3, 2)
        )
        q, k = batch.turned(q, options.rope_base), batch.turned(k, options.rope_base)
        x = x + attend(layer.attention, q, k, v, batch) @ layer.attention.output.weight.T
        a, b = (rms(x, layer.feed_forward_norm.weight) @ layer.inner.weight.T).chunk(2, 2)
        x = x + (silu(a) * b) @ layer.outer.weight.T
    return rms(x, model.norm.weight)


def normed(x: Tensor, norm: nn.LayerNorm, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)


def gpt_oracle(model: Any, options: Any, x: Tensor, batch: Batch) -> Tensor:
    for layer in model.layers:
        qkv = linear(normed(x, layer.attention_norm, 1e-5), layer.attention.qkv.weight, layer.attention.qkv.bias)
        attended = attend(layer.attention, *(heads_of(y) for y in qkv.chunk(3, 2)), batch)
        x = x + linear(attended, layer.attention.output.weight, layer.attention.output.bias)
        hidden = gelu(layer.inner(normed(x, layer.feed_forward_norm, 1e-5)), approximate="tanh")
        x = x + layer.outer(hidden)
    return normed(x, model.norm, 1e-5)


def sasrec_oracle(model: Any, options: Any, x: Tensor, batch: Batch) -> Tensor:
    """With PyTorch's own multi-head attention, as both repositories call it."""
    for layer in model.layers:
        scores = batch.bias(layer.attention).masked_fill(~batch.mask, -math.inf).repeat_interleave(2, 0)
        query = normed(x, layer.attention_norm, 1e-8)
        key = query if options.residual == "llama" else x
        attended = multi_head_attention_forward(
            *(y.transpose(0, 1) for y in (query, key, key)), 12, 2, layer.attention.qkv.weight,
            layer.attention.qkv.bias, None, None, False, 0.0, layer.attention.output.weight,
            layer.attention.output.bias, attn_mask=scores, need_weights=False,
        )[0].transpose(0, 1)  # fmt: skip
        if options.residual == "llama":
            x = x + attended
            x = x + layer.outer(layer.inner(normed(x, layer.feed_forward_norm, 1e-8)).relu())
        else:
            x = normed(query + attended, layer.feed_forward_norm, 1e-8)
            x = x + layer.outer(layer.inner(x).relu())
    if options.variant == "original" or options.residual == "llama":
        x = normed(x, model.norm, 1e-8)
    return x


def hstu_oracle(model: Any, options: Any, x: Tensor, batch: Batch) -> Tensor:
    production = options.variant == "production"
    if production:
        seconds = (batch.query_times - batch.times).clamp(min=1e-6)
        rows = model.input_times.weight[(seconds / 60).sqrt().long().clamp(max=2048)]
        x = x + batch.pad(rows)
    for layer in model.layers:

        def norm(y: Tensor, own: Any) -> Tensor:
            if options.norm == "rms":
                return rms(y, own.weight if production else 1.0)
            return normed(y, own, 1e-6)

        projected = linear(x if options.residual == "post" else norm(x, layer.input_norm), layer.uvqk.weight)
        projected = projected + layer.uvqk.bias if production else silu(projected)
        parts = list(projected.chunk(4 if options.gate else 3, 2))
        u = parts.pop(0) if options.gate else None
        u = silu(u) if production and u is not None else u
        v, q, k = (heads_of(y) for y in parts)
        if options.bias == "rope":
            q, k = batch.turned(q, 10000.0), batch.turned(k, 10000.0)
        if options.scores == "softmax":
            attended = attend(layer, q, k, v, batch)
        else:
            scores = torch.einsum("bihd,bjhd->bhij", q, k) * (6**-0.5 if production else 1.0)
            weights = silu(scores + batch.bias(layer).unsqueeze(1)) / N * batch.mask.unsqueeze(1)
            attended = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        attended = norm(attended, layer.output_norm)
        if u is not None:
            attended = torch.cat([u, attended, u * attended], 2) if production else u * attended
        out = x + linear(attended, layer.output.weight, layer.output.bias)
        x = norm(out, layer.input_norm) if options.residual == "post" else out
    return x


ORACLES = {"llama": llama_oracle, "gpt": gpt_oracle, "sasrec": sasrec_oracle, "hstu": hstu_oracle}
