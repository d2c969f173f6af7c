"""Which rank takes which sequences of a global batch, so that all have about the same work.

Ranks wait for the slowest one at every step. Lengths of recommendation data have a long tail and attention grows with
the square of the length, so ranks with as many sequences, or as many tokens, do not have as much work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceCost:
    """Estimated work of a sequence of n tokens: `linear * n + attention * n (n + 1) / 2`, its causal pairs.

    Attributes:
        linear: work of a token; any unit.
        attention: work of a pair of a token with itself or one before it, in the same unit.
    """

    linear: float
    attention: float

    @classmethod
    def from_flops(cls, flops: Callable[[Tensor], float]) -> SequenceCost:
        """The coefficients of a model whose `flops(lengths [B])` have this form, from sequences of 1 and 2 tokens."""
        one, two = (flops(torch.tensor([n])) for n in (1, 2))  # linear + attention, 2 linear + 3 attention
        attention = two - 2 * one
        return cls(linear=one - attention, attention=attention)

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        """`[B]` float64 of sequences of `lengths [B]`."""
        n = lengths.astype(np.float64)
        costs: np.ndarray = self.linear * n + self.attention * n * (n + 1) / 2
        return costs

    def share(self, lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
        """The `Share` of a `TrainLoader` that spreads this cost."""
        return assign(self(lengths), ranks)


def assign(costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Spread sequences over ranks: the costliest first, each to the rank with the least work so far.

    The largest sum is at most 4/3 of the best one possible (Graham, Bounds on multiprocessing timing anomalies, 1969);
    with many sequences a rank it is within thousandths of the mean. Among equals the lower index comes first, the
    lower rank takes it.

    Args:
        costs: `[B]` float64, not negative.

    Returns:
        For each rank the indices `[B_r]` int64 of its sequences, the costliest first, so that a kernel which starts
        them in this order does not end with the longest. With fewer sequences than ranks some get none.
    """
    order = np.argsort(-costs, kind="stable")
    least = [(0.0, rank) for rank in range(ranks)]  # a heap of (work, rank)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        work, rank = least[0]
        shares[rank].append(index)
        heapreplace(least, (work + cost, rank))
    return [np.array(share, dtype=np.int64) for share in shares]


def imbalance(work: Sequence[float]) -> float:
    """Work (or seconds) of the rank with the most, over the mean of all ranks; 1 where there is none."""
    total = float(sum(work))
    return float(max(work)) * len(work) / total if total > 0 else 1.0
