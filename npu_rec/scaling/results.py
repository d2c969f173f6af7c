"""`results.jsonl` of a sweep: a row a finished or failed point; the last row of a point counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npu_rec.errors import DataError
from npu_rec.scaling.study import Study

Row = dict[str, Any]


def read_results(path: Path) -> dict[str, Row]:
    """Point -> its last row; a last line that was cut off is left out.

    Raises:
        DataError: another line is no JSON.
    """
    rows: dict[str, Row] = {}
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["point"]] = row
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise DataError(f"{path}:{number}: not a row of results") from None
    return rows


def write_row(path: Path, row: Row) -> None:
    """Append a row; whatever a process that was killed left half written is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def finished_rows(study: Study, rows: dict[str, Row]) -> list[Row]:
    """Rows of the study's finished points, in its order; those of another configuration do not count."""
    found = [(point, rows.get(point.name)) for point in study.points]
    return [
        row
        for point, row in found
        if row is not None and row["status"] == "finished" and row["fingerprint"] == point.fingerprint
    ]


def value_of(row: Row, target: str) -> float | None:
    """`valid/loss`, `test/hr@10`, ... of a row; None where it was not measured."""
    split, _, name = target.partition("/")
    value = row["metrics"].get(split, {}).get(name)
    return None if value is None else float(value)
