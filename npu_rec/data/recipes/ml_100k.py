"""MovieLens-100K, from GroupLens' own files or from RecBole's copy of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from npu_rec.data.download import Log, download_wheel
from npu_rec.data.kinds import HalfStars, Id, Kind, Seconds, Text
from npu_rec.data.recipe import RawData
from npu_rec.data.recipes.movielens import TERMS, WHY_MOVIES, GroupLens
from npu_rec.data.rows import ROW, Column, Rows
from npu_rec.data.sources import find, is_archive, need
from npu_rec.data.textio import TextFormat
from npu_rec.errors import DataError
from npu_rec.registry import register

_RECBOLE = TextFormat("\t", clean_name=lambda name: name.partition(":")[0])  # `user_id:token`
_GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_ITEM_ID = Id(zero_is_padding=True)


@register("data", "ml-100k")
class MovieLens100K(GroupLens):
    """Reads `u.data`, `u.item`, `u.user` (GroupLens) or `ml-100k.inter`, `.item`, `.user` (RecBole).

    Without a source, RecBole's wheel is fetched with pip, since who works behind a mirror reaches that first, and
    only the data is taken out of it; if that fails, GroupLens' archive.
    """

    description = "MovieLens-100K: 100,000 ratings of 1,682 movies by 943 users"
    terms = TERMS.format("ml-100k")
    url = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
    wheel = "recbole-1.2.1-py3-none-any.whl"
    wheel_sha256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
    members = ("u.data", "u.item", "u.user", "ml-100k.inter", "ml-100k.item", "ml-100k.user")
    published_events = 100_000

    def obtain(self, downloads: Path, log: Log) -> Path:
        try:
            return download_wheel("recbole==1.2.1", self.wheel, self.wheel_sha256, downloads, log)
        except DataError as first:
            log(f"{first}; trying {self.url}")
            try:
                return super().obtain(downloads, log)
            except DataError as second:
                raise DataError(f"ml-100k cannot be obtained. First way: {first}. Second way: {second}") from None

    def identity(self) -> Any:
        return {"download": ["recbole==1.2.1", self.url]}

    def inputs(self, source: Path) -> list[Path]:
        if is_archive(source):
            return [source]
        files = [self._ratings(source), self._items(source), self._users(source)]
        return [file for file in files if file is not None]

    def _ratings(self, source: Path) -> Path:
        if source.is_file():
            return source
        return need(source, "u.data", "ml-100k.inter", folder="ml-100k", why="it holds the ratings")

    def _recbole(self, source: Path) -> bool:
        return self._ratings(source).name.removesuffix(".gz").endswith(".inter")

    def _items(self, source: Path) -> Path:
        name = "ml-100k.item" if self._recbole(source) else "u.item"
        return need(source, name, folder="ml-100k", why=WHY_MOVIES)

    def _users(self, source: Path) -> Path | None:
        return find(source, "ml-100k.user" if self._recbole(source) else "u.user", folder="ml-100k")

    def read(self, source: Path, rows: Rows) -> RawData:
        ratings, movies, people = self._ratings(source), self._items(source), self._users(source)
        read_items, read_users = (_inter_items, _inter_users) if self._recbole(source) else (_u_items, _u_users)
        layout = TextFormat("\t", names=("user_id", "item_id", "rating", "timestamp"))
        columns = [
            Column("user", Id(), source="user_id"),
            Column("item", _ITEM_ID, source="item_id"),
            Column("action", HalfStars(), source="rating"),
            Column("time", Seconds(), source="timestamp"),
        ]
        return RawData(
            rows.text(ratings, columns, _RECBOLE if self._recbole(source) else layout),
            items=read_items(movies, rows),
            users=None if people is None else read_users(people, rows),
            events_file=ratings.name,
            items_file=movies.name,
        )


def _texts(*names: str) -> list[Column]:
    return [Column(name, Text()) for name in names]


def _u_items(path: Path, rows: Rows) -> pl.DataFrame:
    names = ("item", "title", "release_date", "video_release_date", "imdb_url", *_GENRES)
    layout = TextFormat("|", names=names, encoding="latin-1")
    columns: list[Column] = [Column("item", _ITEM_ID), *_texts("title", "release_date", *_GENRES)]
    frame = rows.text(path, columns, layout)
    flags = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in _GENRES]
    return frame.select(
        ROW,
        "item",
        "title",
        pl.col("release_date").str.extract(r"(\d{4})$").alias("release_year"),
        pl.concat_str(flags, separator="|", ignore_nulls=True).alias("genres"),
    )


def _inter_items(path: Path, rows: Rows) -> pl.DataFrame:
    kinds: dict[str, tuple[str, Kind]] = {"item": ("item_id", _ITEM_ID), "title": ("movie_title", Text())}
    columns = [Column(name, kind, source=source) for name, (source, kind) in kinds.items()]
    columns += [Column("release_year", Text()), Column("genres", Text(), source="class")]
    return rows.text(path, columns, _RECBOLE).with_columns(pl.col("genres").str.replace_all(" ", "|", literal=True))


def _u_users(path: Path, rows: Rows) -> pl.DataFrame:
    layout = TextFormat("|", names=("user", "age", "gender", "occupation", "zip_code"), encoding="latin-1")
    return rows.text(path, [Column("user", Id()), *_texts("age", "gender", "occupation", "zip_code")], layout)


def _inter_users(path: Path, rows: Rows) -> pl.DataFrame:
    columns = [Column("user", Id(), source="user_id"), *_texts("age", "gender", "occupation", "zip_code")]
    return rows.text(path, columns, _RECBOLE)
