"""Benchmarks as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from npu_rec.bench.harness import Row


def table_of(rows: Sequence[Row]) -> Table:
    """One line a row, with the columns that any row has a value for."""
    columns: dict[str, Callable[[Row], str]] = {
        "backend": lambda row: row.backend,
        "shape": lambda row: row.shape,
        "forward ms": lambda row: _milliseconds(row.forward_ms),
        "backward ms": lambda row: _milliseconds(row.backward_ms),
        "speedup": lambda row: f"{row.speedup:.1f}x",
    }
    if any(row.peak_extra_bytes is not None for row in rows):
        columns["extra MiB"] = lambda row: f"{(row.peak_extra_bytes or 0) / 2**20:.0f}"
    if any(row.fraction_of_gemm is not None for row in rows):
        columns["TFLOP/s"] = _rates
        columns["of GEMM rate"] = lambda row: "" if row.fraction_of_gemm is None else f"{row.fraction_of_gemm:.0%}"
    if any(row.rows_per_second is not None for row in rows):
        columns["million rows/s"] = lambda row: f"{(row.rows_per_second or 0) / 1e6:.1f}"
    if any(row.attention_flops_saved is not None for row in rows):
        columns["attention saved (expected)"] = _saved
    table = Table(*columns)
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    return table


def _rates(row: Row) -> str:
    if row.forward_tflops is None or row.backward_tflops is None:
        return ""
    return f"{row.forward_tflops:.3g} / {row.backward_tflops:.3g}"


def _saved(row: Row) -> str:
    if row.attention_flops_saved is None or row.attention_flops_saved_expected is None:
        return ""
    return f"{row.attention_flops_saved:.1%} ({row.attention_flops_saved_expected:.1%})"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"
