"""RetailRocket: what visitors of a shop viewed, put into the cart and bought."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field

from npu_rec.config import Section
from npu_rec.data.kinds import Choice, Id, RawId, Seconds
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import Column, Rows
from npu_rec.data.sources import find, is_archive, need
from npu_rec.data.textio import TextFormat
from npu_rec.registry import register

Behaviour = Literal["view", "addtocart", "transaction"]
FILES: dict[Behaviour, str] = {
    "view": "view_ecommerce.dat",
    "addtocart": "add_to_cart_ecommerce.dat",
    "transaction": "purchase_ecommerce.dat",
}
"""The actions 0, 1, 2 in the publisher's words, and the file of each in the cleaned copy."""


class RetailRocketOptions(Section):
    """What is read."""

    behaviours: list[Behaviour] = Field(
        list(FILES), min_length=1, description="Events that are kept; they stay the actions 0, 1 and 2."
    )


@register("data", "retailrocket", options=RetailRocketOptions)
class RetailRocket(Recipe):
    """Reads the publisher's `events.csv`, or a cleaned copy of it by A. Fortes: a file of each behaviour, `.dat`.

    The copy has no times, an item once a user and behaviour, and ids from 1 on, which are used as they are. A user's
    events stand in it by item: his views come first here, then carts, then purchases. Ids of `events.csv` become 1..n
    by first appearance.
    """

    description = "RetailRocket: 2,756,101 views, carts and purchases of a shop, or the cleaned copy's 92,487, no times"
    terms = "RetailRocket e-commerce data set, Retail Rocket on Kaggle: CC BY-NC-SA 4.0, no commercial use."
    where = "events.csv: www.kaggle.com/datasets/retailrocket/ecommerce-dataset"
    actions = "view 0, addtocart 1, transaction 2"
    members = ("events.csv", *FILES.values())
    options: RetailRocketOptions

    def inputs(self, source: Path) -> list[Path]:
        if is_archive(source):
            return [source]
        published = self._published(source)
        return list(self._copy(source).values()) if published is None else [published]

    def _published(self, source: Path) -> Path | None:
        path = source if source.is_file() else find(source, "events.csv")
        return path if path is not None and path.name.removesuffix(".gz").endswith(".csv") else None

    def _copy(self, source: Path) -> dict[int, Path]:
        """The file of each action that is kept."""
        why = "it holds the behaviour {} in the copy without times; the publisher's own file is events.csv"
        return {code: need(source, FILES[kept], why=why.format(kept)) for code, kept in self._kept().items()}

    def _kept(self) -> dict[int, Behaviour]:
        return {code: behaviour for code, behaviour in enumerate(FILES) if behaviour in self.options.behaviours}

    def read(self, source: Path, rows: Rows) -> RawData:
        published = self._published(source)
        if published is None:
            events = pl.concat([_of_copy(path, code, rows) for code, path in self._copy(source).items()])
            return RawData(events, events_file="the .dat files", action_values=list(FILES))
        columns = [
            Column("user", RawId(), source="visitorid"),
            Column("item", RawId(), source="itemid"),
            Column("time", Seconds("ms"), source="timestamp"),
            Column("action", Choice(list(FILES)), source="event"),
        ]
        events = rows.text(published, columns, TextFormat(","))
        return RawData(events, remap=True, events_file=published.name, action_values=list(FILES))

    def select(self, data: RawData) -> RawData:
        assert isinstance(data.events, pl.DataFrame)
        data.events = data.events.filter(pl.col("action").is_in(list(self._kept())))
        return data


def _of_copy(path: Path, code: int, rows: Rows) -> pl.DataFrame:
    columns = [Column("user", Id(), source="visitorid"), Column("item", Id(zero_is_padding=True), source="itemid")]
    return rows.text(path, columns, TextFormat("\t")).with_columns(pl.lit(code, pl.Int64).alias("action"))
