"""Metrics and evaluation loops."""

from npu_rec.evaluation import predictions, ranking
from npu_rec.evaluation.ranking import compute_metrics, ranks_of

__all__ = ["compute_metrics", "predictions", "ranking", "ranks_of"]
