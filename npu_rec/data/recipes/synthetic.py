"""A made-up stream of any size over a growing vocabulary (a Dirichlet process), for tests and scaling studies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from npu_rec.config import Positive, Section
from npu_rec.data.recipe import DataSize, RawData, Recipe
from npu_rec.data.rows import Rows
from npu_rec.data.store import Int64Array
from npu_rec.registry import register

CHUNK_USERS = 8192
_ITEM_STREAM = 2**63  # Philox key of the items' categories, beyond every user's


class SyntheticOptions(Section):
    """Size and shape of the stream; the defaults are the paper's, but for the number of users."""

    users: Positive = Field(10_000, description="Records, one a user; the paper has 1,000,000.")
    length: Positive = Field(128, description="Events of a record.")
    items: Positive = Field(20_000, description="Item ids 1..items.")
    categories: Positive = Field(100, description="Every item belongs to one.")
    max_user_categories: Positive = Field(5, description="A record draws from 1 to this many.")
    concentration: tuple[float, float] = Field((1.0, 500.0), description="Range of the process's concentration.")
    initial_share: float = Field(0.4, gt=0, le=1, description="Share of the ids available to the first record.")
    seed: int = Field(0, ge=0, lt=2**63, description="Every draw derives from it.")

    @model_validator(mode="after")
    def _consistent(self) -> SyntheticOptions:
        low, high = self.concentration
        if not 0 < low <= high < float("inf"):
            raise ValueError(f"concentration needs 0 < low <= high, not {low}, {high}")
        if self.max_user_categories > self.categories:
            raise ValueError("max_user_categories cannot exceed categories")
        return self


@register("data", "synthetic", options=SyntheticOptions)
class Synthetic(Recipe):
    """The synthetic stream of arXiv 2402.17152 (pointwise aggregated attention, section 3.1; appendix on synthetic
    data), as read here:

    - every item belongs to one category, drawn uniformly;
    - record r of R may hold ids up to floor((s + (1 - s) r / R) items), s = `initial_share`: the rest of the ids
      arrives linearly over the stream;
    - a record draws k uniformly from 1..`max_user_categories`, k distinct categories that have an available item, a
      prior over them uniformly from the simplex, and a concentration a uniformly from its range;
    - its n-th event (n = 1, 2, ...) takes a category from the prior with probability a / (a + n - 1), otherwise that
      of an earlier event chosen uniformly (a Polya urn); then an available item of the category, uniformly;
    - the stream is one event a second: event j of record r happens at second r length + j.

    Draws come from Philox with the key (seed, record), so a record does not depend on how the work is cut up. It
    depends on the number of records through the share r / R only.
    """

    description = "Synthetic stream after the HSTU paper: Dirichlet process over categories, growing vocabulary"
    terms = "made up, no conditions"
    generated = True
    options: SyntheticOptions

    def __init__(self, options: SyntheticOptions) -> None:
        super().__init__(options)
        draws = np.random.Philox(key=_key(options.seed, _ITEM_STREAM)).random_raw(options.items)
        self.category = (_uniform(draws) * options.categories).astype(np.int64)  # [items] of id 1, 2, ...
        order = np.argsort(self.category, kind="stable")
        self._ids = order + 1  # by category, ascending within
        self._start = np.searchsorted(self.category[order], np.arange(options.categories))  # [categories]

    @classmethod
    def states(cls, options: SyntheticOptions) -> DataSize:
        return DataSize(options.items, has_times=True)

    def read(self, source: Path, rows: Rows) -> RawData:
        options = self.options
        items = pl.DataFrame({"item": np.arange(1, options.items + 1), "category": self.category})
        return RawData(self._frames(), items=items)

    def _frames(self) -> Iterator[pl.DataFrame]:
        length = self.options.length
        for start in range(0, self.options.users, CHUNK_USERS):
            stop = min(start + CHUNK_USERS, self.options.users)
            yield pl.DataFrame(
                {
                    "user": np.repeat(np.arange(start, stop), length),
                    "item": self.records(start, stop).ravel(),
                    "time": np.arange(start * length, stop * length),
                }
            )

    def records(self, start: int, stop: int) -> Int64Array:
        """Item ids [stop - start, length] int64 of records start..stop-1."""
        options = self.options
        length, slots = options.length, options.max_user_categories
        count = stop - start
        needed = 2 + options.categories + slots + 3 * length
        raw = np.empty((count, needed), np.uint64)
        for row in range(count):
            raw[row] = np.random.Philox(key=_key(options.seed, start + row)).random_raw(needed)
        number, concentration, keys, weights, fresh, pick, item = np.split(
            _uniform(raw), np.cumsum([1, 1, options.categories, slots, length, length]), axis=1
        )
        available = self._available(np.arange(start, stop))  # [count, categories]
        chosen = np.argsort(np.where(available > 0, keys, 2.0), axis=1)[:, :slots]  # [count, slots]
        k = np.minimum(1 + (number[:, 0] * slots).astype(np.int64), (available > 0).sum(axis=1))
        # k - 1 sorted uniforms cut [0, 1] into k parts that are uniform on the simplex: the cumulative prior.
        prior = np.sort(np.where(np.arange(slots) < k[:, None] - 1, weights, 1.0), axis=1)
        low, high = options.concentration
        a = low + (high - low) * concentration[:, 0]
        slot = np.empty((count, length), np.int64)
        records = np.arange(count)
        for n in range(length):
            # One draw serves both: given that the prior is taken, fresh / share is uniform again.
            share = a / (a + n)
            drawn = np.minimum((fresh[:, n, None] >= prior * share[:, None]).sum(axis=1), k - 1)
            earlier = slot[records, (pick[:, n] * n).astype(np.int64)] if n else drawn
            slot[:, n] = np.where(fresh[:, n] < share, drawn, earlier)
        category = np.take_along_axis(chosen, slot, axis=1)
        within = (item * np.take_along_axis(available, category, axis=1)).astype(np.int64)
        ids: Int64Array = self._ids[self._start[category] + within]
        return ids

    def _available(self, records: Int64Array) -> Int64Array:
        """Items of each category that records may hold. [records, categories]"""
        options = self.options
        share = options.initial_share + (1 - options.initial_share) * records / options.users
        limits = np.maximum((share * options.items).astype(np.int64), 1)
        # Ids are sorted within their category: count those up to the limit by one search in (category, id) order.
        stride = options.items + 1
        places = np.arange(options.categories) * stride
        ordered = self.category[self._ids - 1] * stride + self._ids
        return np.searchsorted(ordered, places + limits[:, None], side="right") - self._start


def _key(seed: int, stream: int) -> np.ndarray:
    return np.array([seed, stream], dtype=np.uint64)


def _uniform(raw: np.ndarray) -> np.ndarray:
    """Raw 64-bit draws as doubles in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53
