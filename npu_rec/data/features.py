"""Categorical features of items and users, as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from npu_rec.data.store import SequenceStore
from npu_rec.errors import ConfigError


@dataclass(frozen=True)
class Wanted:
    """Names of the features of items and of users that a model reads; `key`: the option that names those of items."""

    items: Sequence[str] = ()
    users: Sequence[str] = ()
    key: str = "item_features"


@dataclass(frozen=True)
class Codes:
    """One feature of R rows (item ids or sequences), each with any number of values.

    Attributes:
        values: `[V]` int64, codes 1..size; a row without a value has none.
        offsets: `[R + 1]` int64.
        names: what the codes 1, 2, ... stand for.
    """

    values: Tensor
    offsets: Tensor
    names: Sequence[str]

    @property
    def size(self) -> int:
        """The largest code; 0 stands for no value."""
        return len(self.names)

    @property
    def several(self) -> bool:
        """Whether a row has more than one value."""
        return bool((self.offsets.diff() > 1).any())

    def first(self) -> Tensor:
        """The first code of every row, 0 where it has none, `[R]`."""
        codes = torch.zeros(len(self.offsets) - 1, dtype=torch.int64)
        some = self.offsets.diff() > 0
        codes[some] = self.values[self.offsets[:-1][some]]
        return codes


@dataclass(frozen=True)
class Features:
    """Codes by name: of items, row i for item id i, and of users, row i for sequence i."""

    items: Mapping[str, Codes] = field(default_factory=dict)
    users: Mapping[str, Codes] = field(default_factory=dict)


def encode_features(store: SequenceStore, wanted: Wanted, separator: str = "|") -> Features:
    """The wanted features of a data set; a list, or a text that holds the separator, has several values.

    Raises:
        ConfigError: the data set has no such feature.
    """
    users = store.user_features
    items = {
        name: _codes(
            _column(store.items, name, wanted.key, "items"),
            separator,
            store.items["item_id"].to_numpy(),
            store.num_items,
        )
        for name in wanted.items
    }
    rows = np.arange(store.num_sequences)
    return Features(
        items,
        {
            name: _codes(_column(users, name, "user_features", "users"), separator, rows, len(rows) - 1)
            for name in wanted.users
        },
    )


def _column(table: pa.Table | None, name: str, key: str, whose: str) -> pl.Series:
    taken = ("item_id", "raw_id", "events", "user")
    known = [] if table is None else [column for column in table.column_names if column not in taken]
    if table is None or name not in known:
        raise ConfigError(
            f"task.options.{key}: {name!r} is not a feature of the {whose} ({', '.join(known) or 'there are none'})"
        )
    column = pl.from_arrow(table[name])
    assert isinstance(column, pl.Series)
    return column


def _codes(column: pl.Series, separator: str, rows: np.ndarray, last: int) -> Codes:
    """Codes of the column's values in their sorted order; `rows` are the places of its rows among 0..last."""
    if isinstance(column.dtype, pl.List):
        lists = column.cast(pl.List(pl.String)).list.drop_nulls().fill_null([])
    else:
        lists = column.cast(pl.String).str.split(separator).fill_null([])
    flat = lists.explode(empty_as_null=False)
    distinct = flat.unique().sort()
    values = flat.cast(pl.Enum(distinct)).to_physical().cast(pl.Int64).to_numpy() + 1
    lengths = np.zeros(last + 1, np.int64)
    lengths[rows] = lists.list.len().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Codes(torch.from_numpy(values.copy()), torch.from_numpy(offsets), distinct.to_list())
