"""Benchmarks: every backend and the padded PyTorch form side by side in one run, as ratios."""

from npu_rec.bench.harness import Row
from npu_rec.bench.suites import SUITES, run_suite
from npu_rec.bench.table import table_of

__all__ = ["SUITES", "Row", "run_suite", "table_of"]
