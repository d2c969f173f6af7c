"""Embedding tables."""

from npu_rec.embedding.table import EmbeddingTable

__all__ = ["EmbeddingTable"]
