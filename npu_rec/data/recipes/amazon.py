"""Amazon Books (2014), with Meta's preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from npu_rec.data.download import Log, download
from npu_rec.data.kinds import HalfStars, RawId, Seconds
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.recipes.movielens import HALF_STARS
from npu_rec.data.rows import Column, Rows
from npu_rec.data.sources import is_archive, need
from npu_rec.data.textio import TextFormat
from npu_rec.registry import register

MIN_EVENTS = 5


@register("data", "amazon-books")
class AmazonBooks(Recipe):
    """Reads `ratings_Books.csv` (user, item, rating, timestamp; no header).

    As in Meta's code the events of every item and user are counted once; rows whose item has at least 5 and whose
    user has at least 5 stay, and of these the users with at least 5. The catalogue is the items of the rows, before
    the users are filtered the second time: 695,762, ids 1..n in the order of the sorted raw ids.
    """

    description = "Amazon Books 2014, ratings only: 22.5 million ratings, 695,762 books after filtering"
    terms = (
        "Amazon product data 2014, J. McAuley, UCSD: for research; cite He and McAuley 2016, "
        "doi 10.1145/2872427.2883037. The publisher gives no checksum."
    )
    url = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Books.csv"
    actions = HALF_STARS
    members = ("ratings_Books.csv",)

    def obtain(self, downloads: Path, log: Log) -> Path:
        return download(self.url, downloads, log)

    def identity(self) -> Any:
        return {"download": self.url}

    def inputs(self, source: Path) -> list[Path]:
        return [source if is_archive(source) else self._ratings(source)]

    def _ratings(self, source: Path) -> Path:
        return source if source.is_file() else need(source, "ratings_Books.csv", why="it holds the ratings")

    def read(self, source: Path, rows: Rows) -> RawData:
        path = self._ratings(source)
        columns = [
            Column("user", RawId()),
            Column("item", RawId()),
            Column("action", HalfStars(), source="rating"),
            Column("time", Seconds(), source="timestamp"),
        ]
        layout = TextFormat(",", names=("user", "item", "rating", "timestamp"))
        return RawData(rows.text(path, columns, layout), remap=True, events_file=path.name)

    def select(self, data: RawData) -> RawData:
        assert isinstance(data.events, pl.DataFrame)
        frequent = (pl.len().over("item") >= MIN_EVENTS) & (pl.len().over("user") >= MIN_EVENTS)
        events = data.events.filter(frequent)
        data.items = events.select(pl.col("item").unique().sort())
        data.events = events.filter(pl.len().over("user") >= MIN_EVENTS)
        return data
