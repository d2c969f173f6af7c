"""`npu-rec lower`: the kernels for Ascend through Ascend's own compiler, as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.table import Column, Table

from npu_rec.kernels.ascend.lower import CHIPS, Row, lower

__all__ = ["CHIPS", "Row", "lower", "markdown", "table_of_rows"]

_COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: row.kernel,
    "case": lambda row: row.case,
    "chip": lambda row: row.chip.removeprefix("Ascend"),
    "tile": lambda row: row.tile,
    "cores": lambda row: row.cores,
    "UB KiB": lambda row: _used(row.ub_peak_bytes, row.ub_capacity_bytes),
    "L1 KiB": lambda row: _used(row.l1_peak_bytes, row.l1_capacity_bytes),
    "L0C KiB": lambda row: _used(row.l0c_peak_bytes, row.l0c_capacity_bytes),
    "buffers": lambda row: {True: "double", False: "single", None: ""}[row.multi_buffered],
    "scalar loads": lambda row: _number(row.scalar_loads_in_loops),
    "vector ops": lambda row: _number(row.vector_ops),
    "cube ops": lambda row: _number(row.cube_ops),
    "of time bias": lambda row: _number(row.time_bias_vector_ops),
    "status": lambda row: row.reason or row.status,
}
"""What the table shows of a row; the fields are explained at `Row`."""


def table_of_rows(rows: Sequence[Row]) -> Table:
    """One line a kernel, case and chip."""
    table = Table(*(Column(name, overflow="fold", no_wrap=name == "kernel") for name in _COLUMNS))
    for row in rows:
        table.add_row(*(text(row) for text in _COLUMNS.values()))
    return table


HEAD = """\
<!-- Written by `npu-rec lower --table docs/ascend-kernels.md`; the tests compare. -->

# Kernels for Ascend, lowered

Every kernel of kernels/ascend, lowered by triton-ascend 3.2.0 and bishengir 1.2.0 without an NPU: `npu-rec lower`.
[Ascend](ascend.md#kernels) says what the columns mean. Chips with the same figures share a line.
"""


def markdown(rows: Sequence[Row]) -> str:
    """The page with the table, chips with equal figures on one line."""
    chips: dict[Row, list[str]] = {}
    for row in rows:
        chips.setdefault(replace(row, chip=""), []).append(row.chip.removeprefix("Ascend"))
    merged = [replace(row, chip=", ".join(names)) for row, names in chips.items()]
    lines = [HEAD, f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(text(row) for text in _COLUMNS.values())} |" for row in merged]
    return "\n".join(lines) + "\n"


def _used(peak: int | None, capacity: int | None) -> str:
    if peak is None:
        return ""
    return f"{peak / 1024:.0f}" + (f" of {capacity // 1024}" if capacity else "")


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
