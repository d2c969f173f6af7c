"""The order of training: which sequences form which batch.

An epoch's order is a pure function of (seed, epoch), and a position in training is (epoch, batch).
So any position is reached at once, nothing has to be replayed on resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from npu_rec.data.batch import Batch
from npu_rec.data.splits import Split
from npu_rec.data.stochastic_length import StochasticLength
from npu_rec.ops.random import random_key

Share = Callable[[np.ndarray, int], list[np.ndarray]]
"""Lengths `[B]` of a global batch and how many ranks there are -> indices into it for each, all of them once."""


def in_order(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Sequences dealt out one by one, whatever their lengths."""
    return [np.arange(rank, len(lengths), ranks) for rank in range(ranks)]


class TrainLoader:
    """Global batches of a training split, or one rank's share of them.

    The global batches are the same for any number of ranks; `share` says how their work is laid out.

    Args:
        batch_size: sequences of a global batch at most.
        batch_tokens: tokens of a global batch at most (a single longer sequence is a batch of its own), or None.
        rank, world: this process takes the share of `rank` among `world` ranks.
        share: who takes what; one process alone takes the batch as it is.
        stochastic_length: which sequences are read in part, or None; token budget and shares go by what is read.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        batch_tokens: int | None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        share: Share = in_order,
        stochastic_length: StochasticLength | None = None,
    ) -> None:
        self.split, self.batch_size, self.batch_tokens = split, batch_size, batch_tokens
        self.seed, self.rank, self.world = seed, rank, world
        self.share = share if world > 1 else in_order
        self.stochastic_length = stochastic_length

    def lengths(self, epoch: int) -> np.ndarray:
        """Tokens that the model reads of each sequence of the split in an epoch, `[S]`."""
        if self.stochastic_length is None:
            return self.split.lengths
        return self.stochastic_length.lengths(epoch, self.split.sequences, self.split.lengths)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The global batches of an epoch: rows of the split, in the order of training."""
        keys = random_key(self.seed, "shuffle", epoch, torch.from_numpy(self.split.row_ids))
        order = np.argsort(keys.numpy(), kind="stable")
        tokens = np.concatenate([[0], np.cumsum(self.lengths(epoch)[order])])
        cuts = [0]
        while cuts[-1] < len(order):
            stop = cuts[-1] + self.batch_size
            if self.batch_tokens is not None:
                fits = int(np.searchsorted(tokens, tokens[cuts[-1]] + self.batch_tokens, side="right")) - 1
                stop = min(stop, max(fits, cuts[-1] + 1))
            cuts.append(min(stop, len(order)))
        return [order[a:b] for a, b in pairwise(cuts)]

    def shares(self, rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """For each rank its rows of a global batch; `lengths [S]` are those of the epoch."""
        return [rows[own] for own in self.share(lengths[rows], self.world)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from batch `start` on."""
        lengths = self.lengths(epoch)
        choice = None if self.stochastic_length is None else partial(self.stochastic_length.kept, epoch)
        for rows in self.batches(epoch)[start:]:
            yield self.split.batch(self.shares(rows, lengths)[self.rank], choice=choice)
