"""`results.jsonl` of a sweep: a row a finished or failed point; the last row of a point counts."""

from __future__ import annotations

import fcntl
import json
import logging
from pathlib import Path
from typing import Any

from npu_rec.errors import DataError
from npu_rec.scaling.study import EntropySettings, Study

log = logging.getLogger(__name__)
Row = dict[str, Any]
_MEASURED = {
    "settings", "backbone", "blocks", "width", "parameters", "flops_per_token", "tokens", "tokens_seen", "flops",
    "epochs", "best_epoch", "entropy", "metrics", "seconds",
}  # fmt: skip


def read_results(path: Path) -> dict[str, Row]:
    """Point -> its last row; a last line that was cut off is left out, with a warning.

    Raises:
        DataError: another line is no row.
    """
    rows: dict[str, Row] = {}
    text = path.read_text() if path.is_file() else ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines) or text.endswith("\n"):
                raise DataError(f"{path}:{number}: not a row of results") from None
            log.warning("%s:%d was cut off: its point counts as not finished", path, number)
            continue
        missing = {"point", "fingerprint", "status"} - set(row if isinstance(row, dict) else {})
        if not missing and row["status"] == "finished":
            missing = _MEASURED - set(row)
        if missing:
            raise DataError(f"{path}:{number}: not a row of results: it has no {sorted(missing)[0]!r}")
        rows[row["point"]] = row
    return rows


def write_row(path: Path, row: Row) -> None:
    """Append a row; whatever a process that was killed left half written is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another sweep may write its own
        file.seek(0)
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if _is_json(text[whole:]):
            file.write(b"\n")
        else:
            file.truncate(whole)
        file.write(json.dumps(row).encode() + b"\n")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def finished_rows(study: Study, rows: dict[str, Row]) -> list[Row]:
    """Rows of the study's finished points, in its order; those of another configuration do not count.

    An Approximate Entropy by other settings than the study's is left out of its row.
    """
    stale = [
        point.name
        for point in study.points
        if point.name in rows and rows[point.name]["fingerprint"] != point.fingerprint
    ]
    if stale:
        log.warning("%d rows do not count, their points have another configuration now: %s", len(stale), stale[0])
    finished = _rows_of(study, rows, "finished")
    wanted, default = study.config.entropy.model_dump(), EntropySettings().model_dump()
    other = [row["point"] for row in finished if row.get("entropy_settings", default) != wanted]
    if other:
        log.warning("%s and %d others have an entropy of other settings: it is left out", other[0], len(other) - 1)
    return [{**row, "entropy": None} if row["point"] in other else row for row in finished]


def failed_rows(study: Study, rows: dict[str, Row]) -> list[Row]:
    """Rows of the study's points that failed, in its order; those of another configuration do not count."""
    return _rows_of(study, rows, "failed")


def _rows_of(study: Study, rows: dict[str, Row], status: str) -> list[Row]:
    found = [(point, rows[point.name]) for point in study.points if point.name in rows]
    return [row for point, row in found if row["status"] == status and row["fingerprint"] == point.fingerprint]


def value_of(row: Row, target: str) -> float | None:
    """`valid/loss`, `test/hr@10`, ... of a row; None where it was not measured."""
    split, _, name = target.partition("/")
    value = row["metrics"].get(split, {}).get(name)
    return None if value is None else float(value)
