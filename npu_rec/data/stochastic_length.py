"""Stochastic Length of HSTU (arXiv 2402.17152): long training sequences are mostly read in part.

Lengths of recommendation data have a long tail, and attention costs the square of a length. With N the most events that
the model reads and alpha in (1, 2], a sequence of n events

    n <= N^(alpha / 2)                              is read whole
    n >  N^(alpha / 2), with chance N^alpha / n^2   is read whole
    otherwise                                       is read in part: floor(N^(alpha / 2)) of its events

so attention costs at most 2 N^alpha a sequence in the mean, instead of N^2. All draws are by counter, from the seed,
the epoch, the sequence and, for the choice of events, the place of each: batches and ranks do not change them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from npu_rec.errors import ConfigError
from npu_rec.ops.random import random_key, random_uniform

Selection = Literal["recent", "random", "weighted"]


@dataclass(frozen=True)
class StochasticLength:
    """The rule, and which events of a sequence stay.

    Attributes:
        alpha: in (1, 2]; 2 reads every sequence whole.
        max_seq_len: N.
        selection: the newest events; any, all alike; or any with weights `1 - f_i / sum_j f_j` without replacement,
            where `f_i` is the time from event i to the newest one that is read.
    """

    alpha: float
    max_seq_len: int
    seed: int
    selection: Selection

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            raise ValueError(f"alpha must be in (1, 2], got {self.alpha}")

    @property
    def part(self) -> int:
        """Events of a sequence that is read in part, and the longest that is always read whole."""
        return math.floor(math.pow(self.max_seq_len, self.alpha / 2) * (1 + 1e-12))  # 1024^0.8 is 256

    def probability_whole(self, lengths: np.ndarray) -> np.ndarray:
        """Chance that sequences of `lengths [B]` events are read whole, `[B]` float64."""
        n = np.maximum(lengths, 1).astype(np.float64)
        chance: np.ndarray = np.where(n <= self.part, 1.0, np.minimum(self.max_seq_len**self.alpha / n**2, 1.0))
        return chance

    def lengths(self, epoch: int, sequences: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Events to read of `sequences [B]` of `lengths [B]` events in an epoch, `[B]`."""
        keys = random_key(self.seed, "length", epoch, torch.from_numpy(sequences))
        whole = random_uniform(keys, 1)[:, 0].numpy() < self.probability_whole(lengths)
        drawn: np.ndarray = np.where(whole, lengths, np.minimum(lengths, self.part))
        return drawn

    def kept(self, epoch: int, sequences: np.ndarray, sizes: np.ndarray, times: np.ndarray | None) -> np.ndarray:
        """Which events of windows stay in an epoch, `[T]` bool.

        Args:
            sequences: `[B]` ids of the sequences.
            sizes: `[B]` events of their windows, T in all. The last one of a window is predicted only: it always stays
                and does not count in its length.
            times: `[T]` seconds, or None; for `weighted`.
        """
        mask = np.ones(int(sizes.sum()), dtype=bool)
        drawn = self.lengths(epoch, sequences, sizes - 1)
        starts = np.cumsum(sizes) - sizes
        for row in np.flatnonzero(drawn < sizes - 1):
            start, stop = int(starts[row]), int(starts[row] + sizes[row] - 1)
            own = None if times is None else times[start:stop]
            mask[start:stop] = False
            mask[start + self._choose(epoch, int(sequences[row]), stop - start, int(drawn[row]), own)] = True
        return mask

    def _choose(self, epoch: int, sequence: int, n: int, count: int, times: np.ndarray | None) -> np.ndarray:
        """Places of `count` of `n` events."""
        if self.selection == "recent":
            return np.arange(n - count, n)
        # the first arrivals of exponential clocks whose rates are the weights: a draw without replacement
        keys = random_key(self.seed, "events", epoch, sequence, torch.arange(n))
        arrivals = -np.log(random_uniform(keys, 1)[:, 0].numpy().astype(np.float64))
        if self.selection == "weighted":
            if times is None:
                raise ValueError("weighted selection needs times")
            arrivals /= np.maximum(age_weights(times), 1e-300)
        return np.argsort(arrivals, kind="stable")[:count]


def age_weights(times: np.ndarray) -> np.ndarray:
    """`1 - f_i / sum_j f_j` with `f_i = t_n - t_i` of events at `times [n]`, oldest first; `[n]` float64."""
    ages = (times[-1] - times).astype(np.float64)
    total = ages.sum()
    weights: np.ndarray = 1.0 - ages / total if total > 0 else np.ones(len(times))
    return weights


def make_stochastic_length(
    alpha: float | None, selection: Selection, *, max_seq_len: int, seed: int, has_times: bool
) -> StochasticLength | None:
    """That of a configuration; None when it is off.

    Raises:
        ConfigError: the data has no times to weight events by.
    """
    if alpha is None:
        return None
    if selection == "weighted" and not has_times:
        raise ConfigError(
            "train.stochastic_selection: weighted chooses events by their age, and the data has no times; set it to "
            "random or recent"
        )
    return StochasticLength(alpha, max_seq_len, seed, selection)
