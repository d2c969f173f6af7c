"""OTTO: sessions of a shop with clicks, carts and orders, read in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from npu_rec.data.kinds import MAX_ID, Kind, Problem
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import Column, Rows
from npu_rec.data.sources import is_archive, need
from npu_rec.data.textio import TextFormat
from npu_rec.registry import register

ACTIONS = ("clicks", "carts", "orders")
_SESSION = pl.Struct(
    {"session": pl.Int64, "events": pl.List(pl.Struct({"aid": pl.Int64, "ts": pl.Int64, "type": pl.String}))}
)
_LINES = TextFormat("\0", names=("session",))  # one field a line: JSON text holds no NUL


@register("data", "otto")
class Otto(Recipe):
    """Reads JSON lines `{"session": 1, "events": [{"aid": 2, "ts": 1659304800025, "type": "clicks"}, ...]}`.

    A session is a user. Articles count from 0, so item ids are `aid` + 1.
    """

    description = "OTTO: 216.7 million clicks, carts and orders of 1.86 million articles in 12.9 million sessions"
    terms = "OTTO recommender systems data set, Otto (GmbH & Co KG): CC BY 4.0; github.com/otto-de/recsys-dataset."
    where = "otto-recsys-train.jsonl: www.kaggle.com/datasets/otto/recsys-dataset"
    actions = "clicks 0, carts 1, orders 2"
    members = ("train.jsonl", "otto-recsys-train.jsonl")

    def inputs(self, source: Path) -> list[Path]:
        return [source if is_archive(source) else self._sessions(source)]

    def _sessions(self, source: Path) -> Path:
        return source if source.is_file() else need(source, *self.members, why="it holds the sessions")

    def read(self, source: Path, rows: Rows) -> RawData:
        path = self._sessions(source)
        blocks = rows.stream(path, [Column("session", _Session())], _LINES)
        events = (_events(block["session"]) for block in blocks)
        return RawData(events, item_offset=1, events_file=path.name, action_values=ACTIONS)


def _events(sessions: pl.Series) -> pl.DataFrame:
    return _flat(sessions).select(
        pl.col("session").alias("user"),
        pl.col("aid").alias("item") + 1,
        pl.col("ts").alias("time") // 1000,
        pl.col("type").replace_strict(ACTIONS, range(len(ACTIONS)), return_dtype=pl.Int64).alias("action"),
    )


def _flat(sessions: pl.Series) -> pl.DataFrame:
    """One row an event: `row` (place of its session), `session`, `aid`, `ts`, `type`."""
    frame = sessions.struct.unnest().with_row_index("row")
    return frame.explode("events").unnest("events")


class _Session(Kind):
    """JSON of one session. -> the struct `_SESSION`"""

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        text = raw.set(raw == "", None)
        problems = [Problem(text.is_null(), "is empty")]
        try:
            values = text.str.json_decode(_SESSION)
        except pl.exceptions.ComputeError:  # it does not say in which line
            malformed = text.is_not_null() & ~pl.Series([_decodes(line) for line in text], dtype=pl.Boolean)
            problems.append(Problem(malformed, "is not JSON of a session, its number and its events"))
            values = text.set(malformed, None).str.json_decode(_SESSION)
        return values, [problem for problem in (*problems, *_findings(values)) if problem.mask.any()]


def _decodes(line: str | None) -> bool:
    try:
        pl.Series([line], dtype=pl.String).str.json_decode(_SESSION)
    except pl.exceptions.ComputeError:
        return False
    return True


def _findings(sessions: pl.Series) -> Iterator[Problem]:
    """What is wrong with sessions that are not null."""
    frame = sessions.struct.unnest()
    yield Problem(~frame["session"].is_between(0, MAX_ID).fill_null(False), f"has no session from 0 to {MAX_ID}")
    yield Problem(frame["events"].list.len().fill_null(0) == 0, "has no events")
    events = _flat(sessions)
    wrong = {
        f"has an event whose aid is not an integer from 0 to {MAX_ID - 1}": ~pl.col("aid").is_between(0, MAX_ID - 1),
        "has an event whose ts is not a time in milliseconds since 1970": pl.col("ts") < 0,
        f"has an event whose type is not one of {', '.join(ACTIONS)}": ~pl.col("type").is_in(ACTIONS),
    }
    rows = pl.int_range(len(sessions), eager=True)
    for text, condition in wrong.items():
        yield Problem(rows.is_in(events.filter(condition.fill_null(True))["row"].implode()), text)
