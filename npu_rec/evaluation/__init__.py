"""Metrics and evaluation loops."""

from npu_rec.evaluation import ranking
from npu_rec.evaluation.ranking import compute_metrics, ranks_of

__all__ = ["compute_metrics", "ranking", "ranks_of"]
