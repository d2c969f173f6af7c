"""From a recipe's events to sequences: remap ids, sort by time, group by user, write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from npu_rec.data.checks import Duplicates, check_events, check_listings
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import Rows
from npu_rec.data.shards import Sequences, ShardWriter
from npu_rec.errors import DataError

SHORT = 3  # fewer events than a test item, a validation item and something to train on


@dataclass
class _Totals:
    users: list[pa.Array] = field(default_factory=list)
    events: int = 0
    read: int = 0
    short: int = 0
    out_of_order: int = 0
    item_events: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # [largest id + 1]

    def add(self, block: Sequences, in_order: bool) -> None:
        self.users.append(block.users)
        self.events += len(block.item_ids)
        self.short += int((block.lengths < SHORT).sum())
        counts = np.bincount(block.item_ids, minlength=len(self.item_events))
        counts[: len(self.item_events)] += self.item_events
        self.item_events = counts
        if in_order and block.times is not None:
            back = np.diff(block.times) < 0
            back[np.cumsum(block.lengths)[:-1] - 1] = False  # from one user to the next
            self.out_of_order += int(back.sum())


def convert(recipe: Recipe, data: RawData, rows: Rows, drop_duplicates: bool, folder: Path) -> dict[str, Any]:
    """Check a recipe's data and write sequences, items and users into the folder.

    Returns:
        The part of the manifest that describes them.

    Raises:
        DataError: as `check_events`, and when no event is left.
    """
    check_listings(data, rows)
    duplicates, totals = Duplicates(drop_duplicates), _Totals()
    raw_items: pl.Series | None = None
    chunks: Iterable[pl.DataFrame]
    if isinstance(data.events, pl.DataFrame):
        data.events = next(_checked([data.events], data, rows, duplicates, totals))
        data = recipe.select(data)
        assert isinstance(data.events, pl.DataFrame)
        chunks = [data.events]
        if data.remap:
            listed = [] if data.items is None else [data.items["item"]]
            raw_items = pl.concat([*listed, data.events["item"]]).unique(maintain_order=True)
            chunks = [data.events.with_columns(_codes(data.events["item"], raw_items) + 1)]
    elif data.remap:
        raise DataError("a recipe that streams its events gives final item ids, remap=False")
    else:
        chunks = _checked(data.events, data, rows, duplicates, totals)
    shards, columns = _write_sequences(chunks, data.in_order, totals, folder)
    if not totals.events:
        lost = rows.dropped.get(data.events_file)
        reason = " left after filtering" if totals.read else f" left; {lost}" if lost else ""
        raise DataError(f"{data.events_file}: no events{reason}")
    items = _items(data, raw_items, totals.item_events)
    _write(items, folder / "items.arrow")
    if data.users is not None:
        _write(_aligned(data.users, pa.chunked_array(totals.users)), folder / "users.arrow")
    return {
        "counts": {
            "users": sum(len(users) for users in totals.users),
            "items": len(items),
            "items_seen": int(np.count_nonzero(items["events"])),
            "events": totals.events,
            "events_before_filter": totals.read,
            "bad_rows_dropped": sum(lost.rows for lost in rows.dropped.values()),
            "duplicates": duplicates.count,
            "duplicates_dropped": duplicates.count if drop_duplicates else 0,
            f"users_with_fewer_than_{SHORT}_events": totals.short,
            "times_out_of_order": totals.out_of_order,
            **data.counts,
        },
        "num_items": items["item_id"][-1].as_py(),
        "has_times": "time" in columns,
        "has_actions": "action" in columns,
        "action_values": None if data.action_values is None else list(data.action_values),
        "bad_rows": {file: {"dropped": lost.rows, "first": lost.first} for file, lost in rows.dropped.items()},
        "shards": shards,
    }


def _write_sequences(
    chunks: Iterable[pl.DataFrame], in_order: bool, totals: _Totals, folder: Path
) -> tuple[list[str], list[str]]:
    """Group and write; returns the shards' names and the columns of the events."""
    writer = ShardWriter(folder)
    columns: list[str] | None = None
    for chunk in chunks:
        if columns is not None and columns != chunk.columns:
            raise DataError(f"the recipe's chunks differ: columns {columns}, then {chunk.columns}")
        columns = chunk.columns
        block = group(chunk, in_order)
        totals.add(block, in_order)
        writer.add(block)
    writer.close()
    users = pa.chunked_array(totals.users) if totals.users else pa.chunked_array([], pa.int64())
    if len(users) != len(users.unique()):
        raise DataError("a user stands in two of the recipe's chunks; all events of a user belong into one")
    return writer.files, columns or []


def _checked(
    chunks: Iterable[pl.DataFrame], data: RawData, rows: Rows, duplicates: Duplicates, totals: _Totals
) -> Iterator[pl.DataFrame]:
    for chunk in chunks:
        chunk = duplicates(check_events(chunk, data, rows))
        totals.read += chunk.height
        yield chunk


def _codes(values: pl.Series, distinct: pl.Series) -> pl.Series:
    """The place of each value among the distinct ones. [rows] -> [rows] Int64"""
    return values.cast(pl.Enum(distinct)).to_physical().cast(pl.Int64)


def group(events: pl.DataFrame, in_order: bool) -> Sequences:
    """Events to sequences: users ascending where they are numbers, in order of first appearance where text;
    events of a user stably by time, ties and data without times in file order."""
    users = events["user"]
    if users.dtype == pl.String:
        distinct = users.unique(maintain_order=True)
        events = events.with_columns(_codes(users, distinct).alias("user"))
    keys = ["user"] if in_order or "time" not in events.columns else ["user", "time"]
    events = events.sort(keys, maintain_order=True)
    runs = events["user"].rle().struct.unnest()
    owners = distinct if users.dtype == pl.String else runs["value"]
    return Sequences(
        users=owners.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(
            pa.string() if owners.dtype == pl.String else pa.int64()
        ),
        lengths=runs["len"].to_numpy().astype(np.int64),
        item_ids=events["item"].to_numpy(),
        times=events["time"].to_numpy() if "time" in events.columns else None,
        actions=events["action"].to_numpy() if "action" in events.columns else None,
    )


def _items(data: RawData, raw_items: pl.Series | None, events: np.ndarray) -> pa.Table:
    """The item map: item_id ascending, raw_id, title, events, features."""
    if raw_items is not None:
        ids = pl.int_range(1, len(raw_items) + 1, eager=True)
        frame = pl.DataFrame({"item_id": ids, "raw_id": raw_items})
        if data.items is not None:
            frame = frame.join(data.items, left_on="raw_id", right_on="item", how="left", maintain_order="left")
    else:
        listed = pl.DataFrame({"item": np.flatnonzero(events)}) if data.items is None else data.items
        frame = listed.sort("item").rename({"item": "item_id"})
        frame = frame.with_columns((pl.col("item_id") - data.item_offset).cast(pl.String).alias("raw_id"))
    counts = np.zeros(int(frame["item_id"][-1]) + 1, np.int64)
    counts[: len(events)] = events
    if "title" not in frame.columns:
        frame = frame.with_columns(pl.lit(None, pl.String).alias("title"))
    frame = frame.with_columns(
        pl.col("title").cast(pl.String), pl.Series("events", counts[frame["item_id"].to_numpy()])
    )
    known = ["item_id", "raw_id", "title", "events"]
    return _plain(frame.select([*known, *(name for name in frame.columns if name not in known)]))


def _aligned(users: pl.DataFrame, order: pa.ChunkedArray) -> pa.Table:
    """User features, row i for sequence i; null where a user is not listed."""
    frame = pl.DataFrame({"user": pl.from_arrow(order)})
    return _plain(frame.join(users, on="user", how="left", maintain_order="left"))


def _plain(frame: pl.DataFrame) -> pa.Table:
    """An Arrow table whose texts are of the type `string`."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    texts = [pa.field(f.name, pa.string()) if pa.types.is_large_string(f.type) else f for f in table.schema]
    return table.cast(pa.schema(texts)).combine_chunks()


def _write(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
