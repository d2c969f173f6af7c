"""What commands print."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table


def emit(as_json: bool, document: Any, show: Callable[[Console], None]) -> None:
    """One JSON document, or what `show` prints."""
    if as_json:
        from npu_rec.train.run_dir import without_nan

        print(json.dumps(without_nan(document), indent=1, default=str))
    else:
        console = Console(highlight=False, soft_wrap=True)
        if not console.is_terminal:
            console.width = 140  # a file or a pipe has no width of its own
        show(console)


def metrics_table(metrics: dict[str, dict[str, float]]) -> Table:
    """A row a metric, a column a split."""
    table = Table("metric", *metrics)
    for name in dict.fromkeys(name for values in metrics.values() for name in values):
        table.add_row(name, *(f"{values[name]:.4f}" if name in values else "" for values in metrics.values()))
    return table
