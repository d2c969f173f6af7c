"""Negatives of each position, drawn by counter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from npu_rec.distributed import World
from npu_rec.distributed.world import ALONE
from npu_rec.errors import ConfigError
from npu_rec.ops.random import random_integers

Strategy = Literal["uniform", "in_batch", "popularity"]


class NegativeSampler:
    """Draws columns of the catalogue.

    uniform: every item of the catalogue alike, with replacement (Meta's research code).
    in_batch: alike among the distinct items of the global batch.
    popularity: in proportion to the occurrences in training.

    Args:
        size: C, items of the catalogue.
        counts: `[C]` int64 occurrences of them in training; `popularity` and `log_q` need them.
        world: the ranks that share a global batch; `draw` is collective for in_batch.
    """

    def __init__(self, strategy: Strategy, size: int, counts: Tensor | None = None, world: World = ALONE) -> None:
        self.strategy, self.size, self.counts, self.world = strategy, size, counts, world
        if strategy == "popularity":
            assert counts is not None
            total = int(counts.sum())
            if total == 0:
                raise ConfigError("task.options.negatives: popularity needs training events")
            # thin out what does not fit the 31-bit draw, keeping every item that occurs
            self.cumulative = torch.cumsum(counts if total < 2**31 else -(-counts * 2**30 // total), 0)
            self.total = int(self.cumulative[-1])

    def draw(self, keys: Tensor, count: int, in_batch: Tensor) -> Tensor:
        """`keys [T]` -> `[T, count]` int64 columns; `in_batch [T]` are the columns of the batch's items."""
        if self.strategy == "uniform":
            return random_integers(keys, count, self.size)
        if self.strategy == "in_batch":
            shares = self.world.all_gather_rows(torch.unique(in_batch), "items of the global batch")
            distinct = torch.unique(torch.cat(shares))
            return (
                distinct[random_integers(keys, count, distinct.shape[0])]
                if len(distinct)
                else in_batch.new_zeros((0, count))
            )
        cumulative = self.cumulative.to(keys.device)
        return torch.searchsorted(cumulative, random_integers(keys, count, self.total), right=True)

    def log_q(self) -> Tensor:
        """`[C]` log of the share of training events that an item has, which `correction` takes.

        Raises:
            ConfigError: the draw is uniform, where a correction changes nothing.
        """
        if self.strategy == "uniform":
            raise ConfigError("task.options.log_q: uniform negatives need no correction; set negatives or leave it out")
        assert self.counts is not None
        return torch.log(self.counts.clamp_min(1).double() / self.counts.sum()).float()

    def correction(self, log_share: Tensor, tokens: int) -> Tensor:
        """What is subtracted from logits, `[U]`, up to a number that all of them share.

        The log of the probability of a draw: the share of popularity; for in_batch, which draws the distinct items
        alike, the chance 1 - (1 - share)^tokens that the item is among so many.
        """
        if self.strategy != "in_batch":
            return log_share
        absent = tokens * torch.log1p(-log_share.double().exp().clamp_max(1 - 1e-9))
        return torch.log(-torch.expm1(absent)).to(log_share)
