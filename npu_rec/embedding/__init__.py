"""Embedding tables: in one memory, over ranks, by key, in tiers."""

from npu_rec.embedding.build import build_tables
from npu_rec.embedding.collection import EmbeddingCollection, Plan
from npu_rec.embedding.slot_table import SlotTable
from npu_rec.embedding.table import EmbeddingTable, StaticTable, TableSpec

__all__ = ["EmbeddingCollection", "EmbeddingTable", "Plan", "SlotTable", "StaticTable", "TableSpec", "build_tables"]
