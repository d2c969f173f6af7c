"""Amazon ratings: Books (2014) with Meta's preprocessing, and several categories as the domains of one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import Field, StringConstraints

from npu_rec.config import Positive, Section
from npu_rec.data.download import Log, download
from npu_rec.data.kinds import HalfStars, RawId, Seconds
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.recipes.movielens import HALF_STARS
from npu_rec.data.rows import Column, Rows
from npu_rec.data.sources import is_archive, need
from npu_rec.data.textio import TextFormat
from npu_rec.errors import ConfigError, DataError
from npu_rec.registry import register

MIN_EVENTS = 5
Layout = Literal["2014", "2018"]
LAYOUTS: dict[Layout, TextFormat] = {
    "2014": TextFormat(",", names=("user", "item", "rating", "timestamp")),
    "2018": TextFormat(",", names=("item", "user", "rating", "timestamp")),
}
_RATINGS = (
    Column("user", RawId()),
    Column("item", RawId()),
    Column("action", HalfStars(), source="rating"),
    Column("time", Seconds(), source="timestamp"),
)


def frequent(data: RawData, min_item_events: int, min_user_events: int) -> RawData:
    """Meta's filter: the events of every item and user are counted once; rows of which both have enough stay, and of
    these the users that still have. The item list is the items of the rows, before the users are filtered again."""
    assert isinstance(data.events, pl.DataFrame)
    enough = (pl.len().over("item") >= min_item_events) & (pl.len().over("user") >= min_user_events)
    events = data.events.filter(enough)
    data.items = events.select(pl.col("item").unique().sort())
    data.events = events.filter(pl.len().over("user") >= min_user_events)
    return data


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
        return RawData(rows.text(path, _RATINGS, LAYOUTS["2014"]), remap=True, events_file=path.name)

    def select(self, data: RawData) -> RawData:
        return frequent(data, MIN_EVENTS, MIN_EVENTS)


class AmazonDomainsOptions(Section):
    """The domains and the filter."""

    domains: dict[Annotated[str, StringConstraints(pattern="^[^/]+$")], str] = Field(
        default_factory=dict, description="Name of each domain and its file inside `data.source`; one at least."
    )
    layout: Layout = Field(
        "2014", description="Columns of the files: user, item, rating, timestamp (2014) or item, user, ... (2018)."
    )
    min_item_events: Positive = Field(MIN_EVENTS, description="Items of a domain with fewer events are left out.")
    min_user_events: Positive = Field(MIN_EVENTS, description="Users with fewer events in all domains are left out.")


@register("data", "amazon-domains", options=AmazonDomainsOptions)
class AmazonDomains(Recipe):
    """Reads ratings of several categories (no header); each is a domain of one data set.

    Users are joined by their raw id over the domains. Items are not: the raw id is `<domain>/<id>`, and the feature
    `domain` is the name before the slash. The filter is that of `amazon-books`, users counted over all
    domains.
    """

    description = "Several Amazon categories (2014 or 2018, ratings only) as the domains of one data set"
    terms = "Amazon product data, J. McAuley, UCSD: for research; cite He and McAuley 2016 or Ni et al. 2019."
    where = "ratings of categories: jmcauley.ucsd.edu/data/amazon (2014), nijianmo.github.io/amazon (2018)"
    actions = HALF_STARS
    options: AmazonDomainsOptions

    def __init__(self, options: AmazonDomainsOptions) -> None:
        super().__init__(options)
        if not options.domains:
            raise ConfigError("data.options.domains: names no domain; set it to a mapping of names to files")

    def inputs(self, source: Path) -> list[Path]:
        return [source] if is_archive(source) else list(self._files(source).values())

    def _files(self, source: Path) -> dict[str, Path]:
        """By domain, in the order of the names."""
        files = sorted(self.options.domains.items())
        return {name: need(source, file, why=f"it holds the domain {name}") for name, file in files}

    def read(self, source: Path, rows: Rows) -> RawData:
        parts = [self._ratings(name, path, rows) for name, path in self._files(source).items()]
        return RawData(pl.concat(parts), remap=True, events_file="the ratings")

    def _ratings(self, domain: str, path: Path, rows: Rows) -> pl.DataFrame:
        ratings = rows.text(path, _RATINGS, LAYOUTS[self.options.layout])
        users, items = ratings.select(pl.col("user", "item").str.starts_with("A").mean()).row(0)
        if ratings.height and items > 0.5 > users:
            raise DataError(
                f"{path.name}: most items, but not users, begin with A as Amazon's users do; set data.options.layout"
            )
        return ratings.with_columns(pl.format("{}/{}", pl.lit(domain), "item").alias("item"))

    def select(self, data: RawData) -> RawData:
        data = frequent(data, self.options.min_item_events, self.options.min_user_events)
        assert data.items is not None
        data.items = data.items.with_columns(pl.col("item").str.extract("^([^/]+)/").alias("domain"))
        return data
