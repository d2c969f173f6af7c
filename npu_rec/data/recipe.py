"""What a data set recipe is. For example, in a module that the configuration names under `imports:`,

    @register("data", "my-shop")
    class MyShop(Recipe):
        description = "Purchases of my shop"
        terms = "internal"

        def read(self, source, rows):
            columns = [Column("user", RawId()), Column("item", RawId()), Column("time", Seconds(), source="ts")]
            return RawData(rows.text(source / "sales.csv", columns, TextFormat(",", quoted=True)), remap=True)

then `data.name: my-shop` and `data.source` with the folder of sales.csv.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from npu_rec.data.download import Log
from npu_rec.data.rows import Rows
from npu_rec.errors import DataError


@dataclass(frozen=True)
class DataSize:
    """What planning must know of a data set.

    Attributes:
        num_items: the largest item id; all ids from 1 on are items.
        has_times: whether events have times.
    """

    num_items: int
    has_times: bool


@dataclass
class RawData:
    """What a recipe reads.

    Args:
        events: one row an event in file order: `user`, `item`, optional `time` (int64 seconds), optional `action`
            (int64), optional `rows.ROW` (the line it came from, for messages). `user` and `item` are integers, or text
            where `remap` is set. For streams too large for memory an iterable of such frames: no user in two of
            them, and no remapping.
        items: one row a listed item: `item`, optional `title`, further columns are features.
        users: one row a user: `user`, further columns are features.
        remap: raw ids become 1..n, first in the order of `items`, then of first appearance in the events.
        in_order: the file order is the order of events; times do not change it.
        item_offset: item ids are the publisher's plus this, where those start at 0; without `remap`.
        events_file, items_file: names for messages.
        action_values: what the actions 0, 1, ... stand for, where they are codes of texts.
        counts: further counts for the manifest and the log.
    """

    events: pl.DataFrame | Iterable[pl.DataFrame]
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None
    remap: bool = False
    in_order: bool = False
    item_offset: int = 0
    events_file: str = "events"
    items_file: str = "the item list"
    action_values: Sequence[str] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


class Recipe(ABC):
    """Obtains, reads and describes one data set; registered with `register("data", name, options=Schema)`.

    Args:
        options: the validated `data.options`, an instance of the schema the recipe was registered with.
    """

    description: ClassVar[str]
    terms: ClassVar[str]
    """Licence and conditions, in one line; shown before a download."""
    actions: ClassVar[str] = ""
    """What an action number means, where the data set has actions."""
    where: ClassVar[str] = ""
    """Where the files are had, for a data set that is not downloaded."""
    members: ClassVar[tuple[str, ...]] = ()
    """Names of the files to take out of an archive; empty: all."""
    generated: ClassVar[bool] = False
    """The data is made up: there is nothing to obtain and no source to read."""
    published_events: ClassVar[int | None] = None
    """Events in the publisher's file; another number in a source is mentioned."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def states(cls, options: Any) -> DataSize | None:
        """The size of the data set where it is known without reading it; `npu-rec plan` then prepares nothing."""
        return None

    def obtain(self, downloads: Path, log: Log) -> Path:
        """Get the publisher's files into the folder, verified, and return a file, a folder or an archive.

        Raises:
            DataError: when they cannot be had.
        """
        files = f"files that are not downloaded ({self.where})" if self.where else "your own files"
        raise DataError(f"this recipe reads {files}: set data.source to a file or folder")

    def identity(self) -> Any:
        """What `obtain` gets, as JSON; prepared data is made anew when it changes."""
        return None

    def wanted(self) -> tuple[str, ...]:
        """Names of the files to take out of an archive, those that options name too; empty: all."""
        return self.members

    def inputs(self, source: Path) -> list[Path]:
        """The files `read` will use; prepared data is made anew when one of them changes."""
        return [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())

    @abstractmethod
    def read(self, source: Path, rows: Rows) -> RawData:
        """Read the files through `rows`, which counts or refuses malformed ones.

        Args:
            source: a file or folder; archives have been unpacked. An empty folder for generated data.
        """

    def select(self, data: RawData) -> RawData:
        """Filter events and list items; called once malformed rows and duplicates are out, before remapping."""
        return data
