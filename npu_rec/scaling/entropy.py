"""Approximate Entropy of item sequences (Pincus 1991; as in the Performance Law, arXiv 2412.00430)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npu_rec.data.splits import Split

NO_MATCH = 1e-10
"""Takes the place of C = 0, whose logarithm there is none of."""


def approximate_entropy(sequence: npt.ArrayLike, m: int = 2, r: float = 0.0) -> float:
    """ApEn(m, r) = |Phi^(m+1) - Phi^m| of a sequence of T numbers.

    Phi^m is the mean over i of ln C_i, where C_i is the share of all T - m + 1 windows of m numbers, itself included,
    that differ from window i by at most r in every place. With r below 1 integers must be equal. With r below 0
    nothing matches, and the result is 0.

    Where no number occurs twice and 0 <= r < 1, this is ln((T - m + 1) / (T - m)), a function of the length alone.

    Raises:
        ValueError: T is below m + 1.
    """
    x = np.asarray(sequence)
    if m < 1 or x.ndim != 1 or len(x) < m + 1:
        raise ValueError(f"Approximate Entropy with m = {m} needs at least {m + 1} numbers")
    close = np.abs(x[:, None] - x[None, :]) <= r  # [T, T]
    return float(abs(_phi(close, m + 1) - _phi(close, m)))


def _phi(close: npt.NDArray[np.bool_], m: int) -> float:
    windows = len(close) - m + 1
    match = np.ones((windows, windows), dtype=bool)
    for k in range(m):
        match &= close[k : k + windows, k : k + windows]
    share = match.mean(1)
    return float(np.log(np.where(share > 0, share, NO_MATCH)).mean())


def mean_entropy(split: Split, m: int = 2, r: float = 0.0, last: int = 50) -> float:
    """Mean of ApEn(m, r) over the users of a split, each by the last `last` items of its window.

    Users with fewer than m + 1 items are left out; nan where all are.
    """
    starts = np.maximum(split.starts, split.stops - last)
    events = split.store.gather(split.sequences, starts, split.stops).item_ids
    users = np.split(events, np.cumsum(split.stops - starts)[:-1])
    values = [approximate_entropy(user, m, r) for user in users if len(user) > m]
    return float(np.mean(values)) if values else float("nan")
