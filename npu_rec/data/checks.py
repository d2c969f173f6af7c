"""Checks that every recipe's data passes, an outside recipe's too: types, ranges, listings, duplicates."""

from __future__ import annotations

import polars as pl

from npu_rec.data.kinds import MAX_ID
from npu_rec.data.recipe import RawData
from npu_rec.data.rows import ROW, Rows
from npu_rec.errors import DataError

RESERVED = {"item_id", "raw_id", "events"}


def once(rows: Rows, frame: pl.DataFrame, key: str, file: str) -> pl.DataFrame:
    """Rows of a listing; an id that is listed a second time is a malformed row."""
    return rows.reject(frame, key, ~frame[key].is_first_distinct(), "is listed a second time", file)


def check_listings(data: RawData, rows: Rows) -> None:
    """Check the items and users frames in place, and drop their line numbers."""
    if data.items is not None:
        data.items = _check_listing(data.items, "item", data, rows, data.items_file)
        clash = RESERVED & set(data.items.columns)
        if clash:
            raise DataError(f"{data.items_file}: a feature cannot be named {', '.join(sorted(clash))}; rename it")
    if data.users is not None:
        data.users = _check_listing(data.users, "user", data, rows, "the user list")


def _check_listing(frame: pl.DataFrame, key: str, data: RawData, rows: Rows, file: str) -> pl.DataFrame:
    frame = _check_ids(frame, key, data.remap, rows, file)
    return once(rows, frame, key, file).drop(ROW, strict=False)


def check_events(events: pl.DataFrame, data: RawData, rows: Rows) -> pl.DataFrame:
    """Events with valid ids, times and actions: columns `user`, `item`, and `time` and `action` where given.

    Raises:
        DataError: for a missing column or a wrong type (a fault of the recipe), or a malformed row.
    """
    for name in ("user", "item"):
        events = _check_ids(events, name, data.remap, rows, data.events_file)
    for name in ("time", "action"):
        if name in events.columns:
            if not events[name].dtype.is_integer():
                raise DataError(f"{data.events_file}: {name} must be int64, the recipe gives {events[name].dtype}")
            events = events.with_columns(pl.col(name).cast(pl.Int64))
            events = rows.reject(events, name, events[name].is_null(), "is not an integer", data.events_file)
    if "time" in events.columns:
        events = rows.reject(events, "time", events["time"] < 0, "is a time before 1970", data.events_file)
    if data.items is not None and not data.remap:
        unlisted = ~events["item"].is_in(data.items["item"].implode())
        events = rows.reject(events, "item", unlisted, f"is not listed in {data.items_file}", data.events_file)
    return events.select([name for name in ("user", "item", "time", "action") if name in events.columns])


def _check_ids(frame: pl.DataFrame, name: str, remap: bool, rows: Rows, file: str) -> pl.DataFrame:
    if name not in frame.columns:
        raise DataError(f"{file}: the recipe gives no column {name!r}, only {', '.join(frame.columns)}")
    if remap:
        frame = frame.with_columns(pl.col(name).cast(pl.String))
        return rows.reject(frame, name, frame[name].is_null() | (frame[name] == ""), "is not an id", file)
    if not frame[name].dtype.is_integer():
        raise DataError(
            f"{file}: ids of column {name!r} are {frame[name].dtype}; a recipe that does not remap gives integers"
        )
    frame = frame.with_columns(pl.col(name).cast(pl.Int64, strict=False))
    least = 1 if name == "item" else 0
    valid = frame[name].is_between(least, MAX_ID).fill_null(False)
    return rows.reject(frame, name, ~valid, f"is not an id from {least} to {MAX_ID}", file)


class Duplicates:
    """Counts events that equal an earlier one in user, item, time and action, and takes them out where asked."""

    def __init__(self, drop: bool) -> None:
        self.count = 0
        self._drop = drop

    def __call__(self, events: pl.DataFrame) -> pl.DataFrame:
        distinct = events.unique(keep="first", maintain_order=True) if self._drop else None
        self.count += events.height - (events.n_unique() if distinct is None else distinct.height)
        return events if distinct is None else distinct
