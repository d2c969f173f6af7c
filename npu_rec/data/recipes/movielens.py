"""MovieLens-1M and MovieLens-20M, with Meta's preprocessing: ids as published, every rating an event, ordered
by time, and the catalogue is the publisher's list of movies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from npu_rec.config import Section
from npu_rec.data.download import Log, download
from npu_rec.data.kinds import HalfStars, Id, Integer, Seconds, Text
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import Column, Rows
from npu_rec.data.sources import find, is_archive, need
from npu_rec.data.textio import TextFormat
from npu_rec.errors import DataError
from npu_rec.registry import register

TERMS = (
    "MovieLens ({}), GroupLens, University of Minnesota: free for research, no commercial use without permission, "
    "no redistribution; see the README in the archive. Cite Harper and Konstan 2015, doi 10.1145/2827872."
)
HALF_STARS = "rating in half stars (twice the stars): 1..10"
WHY_MOVIES = "it lists the movies, the catalogue"


def _dat(*names: str) -> TextFormat:
    return TextFormat("::", names, encoding="latin-1")


class GroupLens(Recipe):
    """What the official archives have in common: `<url>.md5` beside each."""

    url: str
    actions = HALF_STARS

    def obtain(self, downloads: Path, log: Log) -> Path:
        return download(self.url, downloads, log, md5_url=f"{self.url}.md5")

    def identity(self) -> Any:
        return {"download": self.url}


class MovieLens1MOptions(Section):
    """`data.options` of `ml-1m`."""

    labels_file: str | None = Field(
        None,
        description="CSV file inside the source with `user,item,rating,timestamp` of some of the events of "
        "`ratings.csv`: their actions and times. Other events then have action 0, not known.",
    )


@register("data", "ml-1m", options=MovieLens1MOptions)
class MovieLens1M(GroupLens):
    """Reads the official `ratings.dat`, `movies.dat`, `users.dat`; or, for ratings, `ratings.csv`: columns
    `user,item` and optionally `timestamp` and `ts_known`.

    A column `ts_known` says that times are known in part and the file's order is exact: then times do not change
    it. Ratings are not read from that file: they are known for a biased part of the events. A sample of them that is
    not biased can stand beside it (`labels_file`).
    """

    description = "MovieLens-1M: 1,000,209 ratings of 3,706 movies (3,883 listed) by 6,040 users"
    terms = TERMS.format("ml-1m")
    url = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    members = ("ratings.dat", "ratings.csv", "movies.dat", "users.dat")
    published_events = 1_000_209

    def wanted(self) -> tuple[str, ...]:
        name = self.options.labels_file
        return self.members if name is None else (*self.members, name.removesuffix(".gz"))

    def inputs(self, source: Path) -> list[Path]:
        if is_archive(source):
            return [source]
        files = [self._ratings(source), self._movies(source), find(source, "users.dat", folder="ml-1m")]
        return [file for file in (*files, self._labels(source)) if file is not None]

    def _ratings(self, source: Path) -> Path:
        if source.is_file():
            return source
        return need(source, "ratings.dat", "ratings.csv", folder="ml-1m", why="it holds the ratings")

    def _movies(self, source: Path) -> Path:
        return need(source, "movies.dat", folder="ml-1m", why=WHY_MOVIES)

    def _labels(self, source: Path) -> Path | None:
        name = self.options.labels_file
        return None if name is None else need(source, name, why="data.options.labels_file names it")

    def read(self, source: Path, rows: Rows) -> RawData:
        ratings, movies = self._ratings(source), self._movies(source)
        is_csv = ratings.name.removesuffix(".gz").endswith(".csv")
        labels = self._labels(source)
        if labels is not None and not is_csv:
            raise DataError(f"data.options.labels_file: {ratings.name} has all the ratings itself")
        events = _csv_ratings(ratings, rows) if is_csv else _dat_ratings(ratings, rows)
        counts: dict[str, int] = {}
        if labels is not None:
            events, counts = _labelled(events, rows.text(labels, RATED, TextFormat(",")))
        return RawData(
            events,
            items=_dat_movies(movies, rows),
            users=_dat_users(find(source, "users.dat", folder="ml-1m"), rows),
            in_order="ts_known" in events.columns,
            events_file=ratings.name,
            items_file=movies.name,
            counts=counts,
        )


RATED = (
    Column("user", Id()),
    Column("item", Id(zero_is_padding=True)),
    Column("action", HalfStars(), source="rating"),
    Column("time", Seconds(), source="timestamp"),
)


def _dat_ratings(path: Path, rows: Rows) -> pl.DataFrame:
    return rows.text(path, RATED, _dat("user", "item", "rating", "timestamp"))


def _labelled(events: pl.DataFrame, labels: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Events with the actions and times of those that have a label, and counts of the labels."""
    known = labels.select("user", "item", "action", pl.col("time").alias("_time")).unique(
        ["user", "item"], keep="first", maintain_order=True
    )
    joined = events.join(known, on=["user", "item"], how="left", maintain_order="left")
    found = int(joined["action"].is_not_null().sum())
    if "time" in events.columns:
        joined = joined.with_columns(pl.coalesce("_time", "time").alias("time"))
    joined = joined.drop("_time").with_columns(pl.col("action").fill_null(0))
    return joined, {
        "labels": found,
        "labels_without_event": len(known) - found,
    }


def _csv_ratings(path: Path, rows: Rows) -> pl.DataFrame:
    columns = [
        Column("user", Id()),
        Column("item", Id(zero_is_padding=True)),
        Column("time", Seconds(), source="timestamp", optional=True),
        Column("ts_known", Integer(), optional=True),
    ]
    return rows.text(path, columns, TextFormat(","))


def _dat_movies(path: Path, rows: Rows) -> pl.DataFrame:
    columns = [Column("item", Id(zero_is_padding=True)), Column("title", Text()), Column("genres", Text())]
    return rows.text(path, columns, _dat("item", "title", "genres"))


def _dat_users(path: Path | None, rows: Rows) -> pl.DataFrame | None:
    if path is None:
        return None
    names = ("user", "gender", "age", "occupation", "zip_code")
    columns = [Column("user", Id()), *(Column(name, Text()) for name in names[1:])]
    return rows.text(path, columns, _dat(*names))


@register("data", "ml-20m")
class MovieLens20M(GroupLens):
    """Reads the official `ratings.csv` and `movies.csv`."""

    description = "MovieLens-20M: 20,000,263 ratings of 26,744 movies (27,278 listed) by 138,493 users"
    terms = TERMS.format("ml-20m")
    url = "https://files.grouplens.org/datasets/movielens/ml-20m.zip"
    members = ("ratings.csv", "movies.csv")
    published_events = 20_000_263

    def inputs(self, source: Path) -> list[Path]:
        if is_archive(source):
            return [source]
        return list(self._files(source))

    def _files(self, source: Path) -> tuple[Path, Path]:
        movies = need(source, "movies.csv", folder="ml-20m", why=WHY_MOVIES)
        if source.is_file():
            return source, movies
        return need(source, "ratings.csv", folder="ml-20m", why="it holds the ratings"), movies

    def read(self, source: Path, rows: Rows) -> RawData:
        ratings, movies = self._files(source)
        quoted = TextFormat(",", quoted=True)
        events = rows.text(
            ratings,
            [
                Column("user", Id(), source="userId"),
                Column("item", Id(zero_is_padding=True), source="movieId"),
                Column("action", HalfStars(), source="rating"),
                Column("time", Seconds(), source="timestamp"),
            ],
            quoted,
        )
        listed = [Column("item", Id(zero_is_padding=True), source="movieId"), Column("title", Text())]
        items = rows.text(movies, [*listed, Column("genres", Text())], quoted)
        return RawData(events, items=items, events_file=ratings.name, items_file=movies.name)
