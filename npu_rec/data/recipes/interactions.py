"""Any events: CSV, TSV or Parquet with user, item, and optionally time, action, and features of items and users."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from npu_rec.config import Section
from npu_rec.data.checks import once
from npu_rec.data.kinds import Choice, Feature, Integer, Kind, RawId, Seconds, Text, TimeUnit
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import ROW, Column, Rows
from npu_rec.data.sources import is_archive
from npu_rec.data.textio import TextFormat
from npu_rec.errors import DataError
from npu_rec.registry import register

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
_TABLES = (*_SEPARATORS, ".parquet")


class InteractionsOptions(Section):
    """Names of files and columns."""

    file: str | None = Field(
        None, description="The events, inside `data.source`. Unset: the source is the file, or holds one table only."
    )
    user: str = Field("user", description="Column of user ids, numbers or text.")
    item: str = Field("item", description="Column of item ids, numbers or text.")
    timestamp: str | None = Field("timestamp", description="Column of times; null for data without: file order counts.")
    time_unit: TimeUnit = Field("s", description="Of the times: s, ms, us, ns since 1970, or iso8601 text.")
    action: str | None = Field(None, description="Column of actions, integers unless `action_values` is set.")
    action_values: list[str] | None = Field(
        None, min_length=1, description="Texts in the action column; they become 0, 1, ... in this order."
    )
    columns: list[str] | None = Field(None, min_length=2, description="Column names, for events without a header.")
    separator: str | None = Field(
        None, min_length=1, description="Between fields. Unset: a comma for .csv, a tab for other text files."
    )
    encoding: Literal["utf-8", "latin-1"] = Field("utf-8", description="Of text files.")
    items_file: str | None = Field(
        None, description="Table of items inside the source: the item column, the others are features."
    )
    title: str | None = Field(None, description="Column of the item table that holds titles; unset: `title`, if there.")
    users_file: str | None = Field(
        None, description="Table of users inside the source: the user column, the others are features."
    )

    @model_validator(mode="after")
    def _consistent(self) -> InteractionsOptions:
        if self.title is not None and self.items_file is None:
            raise ValueError("title names a column of items_file, which is not set")
        if self.action_values is not None and self.action is None:
            raise ValueError("action_values needs action, the column that holds them")
        if self.action_values is not None and len(set(self.action_values)) < len(self.action_values):
            raise ValueError("action_values must differ from each other")
        named = [name for name in (self.user, self.item, self.timestamp, self.action) if name is not None]
        if len(set(named)) < len(named):
            raise ValueError("user, item, timestamp and action must be different columns")
        return self


@register("data", "interactions", options=InteractionsOptions)
class Interactions(Recipe):
    """Ids become 1..n in the order of first appearance; listed items without events come after those.

    Text tables have a header (or `columns`), fields may be quoted; all may be .gz. Feature columns of text tables
    stay text, those of Parquet keep their type.
    """

    description = "Your own events: CSV, TSV or Parquet with user, item, optional time, action and features"
    terms = "your own data"
    actions = "integers as given, or places in action_values"
    options: InteractionsOptions

    def inputs(self, source: Path) -> list[Path]:
        if is_archive(source):
            return [source]
        names = (self.options.items_file, self.options.users_file)
        return [self._events(source), *(self._inside(source, name) for name in names if name is not None)]

    def _inside(self, source: Path, name: str) -> Path:
        path = (source if source.is_dir() else source.parent) / name
        if not path.is_file():
            raise DataError(f"{path}: no such file (named in data.options)")
        return path

    def _events(self, source: Path) -> Path:
        options = self.options
        if options.file is not None:
            return self._inside(source, options.file)
        if source.is_file():
            return source
        others = {options.items_file, options.users_file}
        tables = [path for path in sorted(source.iterdir()) if _suffix(path) in _TABLES and path.name not in others]
        if len(tables) != 1:
            found = ", ".join(path.name for path in tables) or "none"
            raise DataError(f"{source}: expected one table of events there, found {found}; set data.options.file")
        return tables[0]

    def read(self, source: Path, rows: Rows) -> RawData:
        options = self.options
        path = self._events(source)
        action: Kind = Choice(tuple(options.action_values)) if options.action_values else Integer()
        time = Seconds(options.time_unit, option="data.options.time_unit")
        columns = [
            Column("user", RawId(), options.user, "set data.options.user to the column's name"),
            Column("item", RawId(), options.item, "set data.options.item to the column's name"),
        ]
        if options.timestamp is not None:
            hint = "set data.options.timestamp to the column's name, or to null for data without times"
            columns.append(Column("time", time, options.timestamp, hint))
        if options.action is not None:
            columns.append(Column("action", action, options.action, "set data.options.action to the column's name"))
        if _suffix(path) == ".parquet":
            events = rows.parquet(path, columns)
        else:
            events = rows.text(path, columns, self._layout(path, tuple(options.columns or ())))
        return RawData(
            events,
            items=self._items(source, events, rows),
            users=None if options.users_file is None else self._features(source, options.users_file, "user", rows),
            remap=True,
            events_file=path.name,
            items_file=options.items_file or "the item list",
            action_values=options.action_values,
        )

    def _layout(self, path: Path, names: tuple[str, ...] = ()) -> TextFormat:
        separator = self.options.separator or _SEPARATORS.get(_suffix(path), "\t")
        return TextFormat(separator, names, self.options.encoding, quoted=len(separator) == 1)

    def _items(self, source: Path, events: pl.DataFrame, rows: Rows) -> pl.DataFrame | None:
        if self.options.items_file is None:
            return None
        listed = self._features(source, self.options.items_file, "item", rows)
        seen = events.select(pl.col("item").unique(maintain_order=True))
        silent = listed.join(seen, on="item", how="anti", maintain_order="left")
        unlisted = seen.height - (listed.height - silent.height)
        if unlisted:
            rows.log(f"{self.options.items_file}: {unlisted} of {seen.height} items with events are not listed there")
        return pl.concat([seen.join(listed, on="item", how="left", maintain_order="left"), silent], how="diagonal")

    def _features(self, source: Path, name: str, key: str, rows: Rows) -> pl.DataFrame:
        """The key and all other columns of a table of items or users."""
        path = self._inside(source, name)
        id_name = self.options.item if key == "item" else self.options.user
        title = self.options.title if key == "item" else None

        def columns(names: list[str]) -> list[Column]:
            if title not in (None, "title") and "title" in names:
                raise DataError(f"{name}: has a column 'title' besides {title!r}; rename one of them")
            if key != id_name and key in names:
                raise DataError(f"{name}: has a column {key!r} besides {id_name!r}, the {key}s; rename one of them")
            features = [Column(other, Feature()) for other in names if other not in (id_name, title)]
            titles = [] if title is None else [Column("title", Text(), title, "set data.options.title")]
            return [Column(key, RawId(), id_name, "the column is named as in the events"), *titles, *features]

        if _suffix(path) == ".parquet":
            frame = rows.parquet(path, columns)
        else:
            frame = rows.text(path, columns, self._layout(path))
        return once(rows, frame, key, name).drop(ROW)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()
