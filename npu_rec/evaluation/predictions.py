"""Metrics of predicted actions.

A metric is a function `(scores [M], labels [M], groups [M]) -> float`, all float64 but int64 groups (the users).
Register another with `@register("prediction_metric", "name")`. Scores of a binary target are logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from npu_rec.registry import lookup, register

BINARY = ("auc", "gauc", "logloss", "ne")
REGRESSION = ("mse", "mae")
LOWER_IS_BETTER = ("logloss", "ne", "mse", "mae")


def prediction_metric(name: str, scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """A registered metric.

    Raises:
        ConfigError: there is none of that name.
    """
    return float(lookup("prediction_metric", name).target(scores, labels, groups))


@register("prediction_metric", "auc")
def auc(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Area under the ROC curve; NaN where all labels are alike."""
    from torchmetrics.functional.classification import binary_auroc

    if labels.unique().numel() < 2 or bool(scores.isnan().any()):
        return math.nan
    # logits beyond 37 round to a probability of 1 and would tie
    ranks = torch.unique(scores, return_inverse=True)[1].double()
    return float(binary_auroc(ranks / ranks.max().clamp_min(1.0), labels.to(torch.int64)))


@register("prediction_metric", "gauc")
def gauc(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """AUC of each user, mean weighted by events; users whose labels are all alike are left out (DIN, section 6.2)."""
    if bool(scores.isnan().any()):
        return math.nan
    users, group = torch.unique(groups, return_inverse=True)
    count = len(users)
    ordered = torch.unique(scores, return_inverse=True)[1]
    order = torch.argsort(group * (int(ordered.max()) + 1 if len(ordered) else 1) + ordered)
    group, ordered, labels = group[order], ordered[order], labels[order]
    sizes = torch.bincount(group, minlength=count)
    place = torch.arange(len(group)) - (torch.cumsum(sizes, 0) - sizes)[group] + 1.0
    _, tie = torch.unique_consecutive(torch.stack([group, ordered]), dim=1, return_inverse=True)
    ties = torch.zeros(int(tie.max()) + 1 if len(tie) else 0, dtype=torch.float64)
    rank = (ties.index_add(0, tie, place.double()) / torch.bincount(tie).clamp_min(1))[tie]
    zeros = torch.zeros(count, dtype=torch.float64)
    positives = zeros.index_add(0, group, labels.double())
    negatives = sizes - positives
    above = zeros.index_add(0, group, rank * labels) - positives * (positives + 1) / 2
    kept = (positives > 0) & (negatives > 0)
    if not kept.any():
        return math.nan
    values = above[kept] / (positives * negatives)[kept]
    return float((values * sizes[kept]).sum() / sizes[kept].sum())


@register("prediction_metric", "logloss")
def logloss(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Mean cross-entropy, in nats."""
    return float(binary_cross_entropy_with_logits(scores, labels))


@register("prediction_metric", "ne")
def normalised_entropy(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Log-loss over that of predicting the mean label; NaN where all labels are alike (He et al. 2014, section 3.1)."""
    mean = labels.mean()
    entropy = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
    return logloss(scores, labels, groups) / float(entropy)


@register("prediction_metric", "mse")
def mean_squared_error(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Mean squared error."""
    return float((scores - labels).square().mean())


@register("prediction_metric", "mae")
def mean_absolute_error(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Mean absolute error."""
    return float((scores - labels).abs().mean())
