"""Ranking metrics over the ranks of the true items.

A metric is `f(ranks [U] int64 from 1, k | None) -> float` and higher is better. Register another
with `@register("metric", "name")`; `name@10` in `eval.metrics` then calls it with k = 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.errors import ConfigError
from npu_rec.registry import lookup, register


def ranks_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank, from 1, of each row's target; of equal scores the smaller column comes first. A NaN never wins.

    Args:
        scores: `[B, C]`; items out of the ranking hold -inf.
        targets: `[B]` int64 column of the true item.
    """
    own = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    columns = torch.arange(scores.shape[1], device=scores.device)
    return is_ahead(scores, columns, own, targets).sum(1) + 1


def is_ahead(scores: Tensor, columns: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """`[B, n]`: which of `scores [B, n]` of `columns [n]` come before each row's target, of score `own [B]`."""
    own, targets = own.unsqueeze(1), targets.unsqueeze(1)
    return ~((scores < own) | ((scores == own) & (columns >= targets)))  # not itself, but for a NaN


def compute_metrics(ranks: Tensor, names: list[str]) -> dict[str, float]:
    """Metrics such as `hr@10`, `mrr` of `ranks [U]`.

    Raises:
        ConfigError: a name is unknown or its k is not a positive number.
    """
    values = {}
    for name in names:
        base, at, k = name.partition("@")
        if at and not (k.isdecimal() and int(k) > 0):
            raise ConfigError(f"eval.metrics: {name!r}: expected name@k with a positive k")
        values[name] = float(lookup("metric", base).target(ranks, int(k) if at else None))
    return values


@register("metric", "hr")
def hit_rate(ranks: Tensor, k: int | None) -> float:
    """Share of users whose true item is among the first k."""
    return float((ranks <= _needs_k("hr", k)).double().mean()) if ranks.numel() else 0.0


@register("metric", "ndcg")
def ndcg(ranks: Tensor, k: int | None) -> float:
    """Mean of 1 / log2(rank + 1) where rank <= k, 0 elsewhere: NDCG with one relevant item."""
    gain = 1.0 / torch.log2(ranks.double() + 1.0)
    return float((gain * (ranks <= _needs_k("ndcg", k))).mean()) if ranks.numel() else 0.0


@register("metric", "mrr")
def mrr(ranks: Tensor, k: int | None) -> float:
    """Mean of 1 / rank; with k, 0 beyond rank k."""
    kept = torch.ones_like(ranks) if k is None else ranks <= k
    return float((kept / ranks.double()).mean()) if ranks.numel() else 0.0


def _needs_k(name: str, k: int | None) -> int:
    if k is None:
        raise ConfigError(f"eval.metrics: {name!r} needs a cut, such as {name}@10")
    return k
