"""Histories with times, the production model's sizes and random weights, for the tests of HSTU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from strategies import generator, normal
from torch import Tensor, nn

from npu_rec.config import ModelConfig
from npu_rec.ops.jagged import lengths_to_offsets

ITEMS = 40
PRODUCTION = ModelConfig(
    embedding_dim=10, num_blocks=2, num_heads=2, attention_dim=4, linear_dim=5, max_seq_len=20, max_output_len=3
)


@dataclass(frozen=True)
class Histories:
    """Sequences of ids with times, and the time of each request."""

    ids: list[list[int]]
    times: list[list[int]]
    requests: list[int]

    @staticmethod
    def random(*lengths: int, seed: int = 0) -> Histories:
        g = generator(seed)
        ids = [torch.randint(1, ITEMS + 1, (n,), generator=g).tolist() for n in lengths]
        gaps = [(torch.rand(n + 1, generator=g) * 15).exp().long() for n in lengths]  # from seconds to a month
        times = [(1_000_000_000 + gap.cumsum(0)).tolist() for gap in gaps]
        return Histories(ids, [own[:-1] for own in times], [own[-1] for own in times])

    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, offsets, times, times of the next events."""
        following = [[*own[1:], request][: len(own)] for own, request in zip(self.times, self.requests, strict=True)]
        ids, times, next_times = (
            torch.tensor([x for own in jagged for x in own], dtype=torch.int64)
            for jagged in (self.ids, self.times, following)
        )
        return (
            ids,
            lengths_to_offsets(torch.tensor([len(own) for own in self.ids], dtype=torch.int64)),
            times,
            next_times,
        )

    def part(self, *rows: int) -> Histories:
        return Histories(*([jagged[row] for row in rows] for jagged in (self.ids, self.times, self.requests)))


def randomise(model: nn.Module, seed: int, scale: float) -> None:
    """Every weight normal, those of norms around 1."""
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(normal(g, *parameter.shape, scale=scale) + (1.0 if "norm.weight" in name else 0.0))
