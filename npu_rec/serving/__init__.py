"""Answers from a trained model."""

from npu_rec.serving.recommend import Recommendation, Recommender, parse_history, read_users

__all__ = ["Recommendation", "Recommender", "parse_history", "read_users"]
