"""What a column of a raw file must hold: vectorised conversion of its text, and what is wrong with it.

A kind converts a polars series of text (or, from Parquet, of dates) and names the values it cannot
take. `npu_rec.data.rows` turns those into an error with file, row and column, or into dropped rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import polars as pl

MAX_ID = 2**31 - 1
"""Largest id a data set may use without remapping: tables and operators index with int32 on devices."""

TimeUnit = Literal["s", "ms", "us", "ns", "iso8601"]
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_EARLIEST_MOSTLY = 10**8  # seconds: March 1973
_LATEST = 10**11  # seconds: the year 5138; the same number of milliseconds is the year 1973


class Problem(NamedTuple):
    """Values that cannot be taken."""

    mask: pl.Series  # [rows] Boolean without nulls
    text: str  # follows the value: "'abc' is not an integer"
    fatal: bool = False  # not a matter of single rows (a wrong unit): an error even where rows may be dropped


class Kind(ABC):
    """The meaning of a column."""

    @abstractmethod
    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        """Convert [rows] values; rows that a problem marks hold anything."""


def as_text(raw: pl.Series) -> pl.Series:
    """Values of a typed (Parquet) column as the text a CSV file would hold; whole floats lose their `.0`."""
    if raw.dtype == pl.String:
        return raw
    if raw.dtype.is_float():
        whole = raw.cast(pl.Int64, strict=False)
        text = raw.cast(pl.String)
        return text.set(whole.cast(raw.dtype).eq(raw).fill_null(False), None).fill_null(whole.cast(pl.String))
    return raw.cast(pl.String)


def _problem(mask: pl.Series, text: str) -> list[Problem]:
    mask = mask.fill_null(False)
    return [Problem(mask, text)] if mask.any() else []


def _integers(raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
    text = as_text(raw)
    values = text.cast(pl.Int64, strict=False)
    failed = values.is_null()
    if not failed.any():
        return values, []
    too_long = failed & text.str.contains(r"^[+-]?\d{19,}$").fill_null(False)
    return values, _problem(too_long, "is out of range") + _problem(failed & ~too_long, "is not an integer")


@dataclass(frozen=True)
class Id(Kind):
    """An integer id that is used as it is: 0..MAX_ID, for items 1..MAX_ID. -> Int64"""

    zero_is_padding: bool = False

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        values, problems = _integers(raw)
        problems += _problem(values < 0, "is a negative id")
        problems += _problem(values > MAX_ID, f"is larger than the largest id, {MAX_ID}")
        if self.zero_is_padding:
            problems += _problem(values == 0, "is the id that stands for padding; ids start at 1")
        return values, problems


@dataclass(frozen=True)
class RawId(Kind):
    """Any text that is not empty, to be remapped. -> String"""

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        values = as_text(raw)
        return values, _problem(values.is_null() | (values == ""), "is not an id")


@dataclass(frozen=True)
class Integer(Kind):
    """Any integer of 64 bits. -> Int64"""

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        return _integers(raw)


@dataclass(frozen=True)
class Text(Kind):
    """Free text; empty is null. -> String"""

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        return Feature().convert(as_text(raw))


@dataclass(frozen=True)
class Feature(Kind):
    """Anything; typed columns keep their type, empty text is null."""

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        return (raw.set(raw == "", None) if raw.dtype == pl.String else raw), []


@dataclass(frozen=True)
class Choice(Kind):
    """One of some texts. -> Int64, its place among them"""

    values: Sequence[str]

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        places = range(len(self.values))
        values = as_text(raw).replace_strict(list(self.values), list(places), default=None, return_dtype=pl.Int64)
        return values, _problem(values.is_null(), f"is not one of {', '.join(self.values)}")


@dataclass(frozen=True)
class HalfStars(Kind):
    """A rating of 0.5 to 5 stars in steps of one half. -> Int64, twice the stars"""

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        doubled = as_text(raw).cast(pl.Float64, strict=False) * 2
        values = doubled.cast(pl.Int64, strict=False)
        number = doubled.is_not_null()
        finite = doubled.is_finite().fill_null(False)
        problems = _problem(~number, "is not a number") + _problem(number & ~finite, "is not finite")
        on_scale = (values == doubled) & values.is_between(1, 10)
        return values, problems + _problem(finite & ~on_scale.fill_null(False), "is not a rating (0.5, 1, ... 5)")


@dataclass(frozen=True)
class Seconds(Kind):
    """A time in some unit since 1970 (UTC), or ISO 8601 text (UTC where it names no offset). -> Int64 seconds

    Fractions are cut towards the past. Date columns of Parquet files say their unit themselves.
    """

    unit: TimeUnit = "s"
    option: str = ""  # the configuration key that sets the unit, if there is one

    def convert(self, raw: pl.Series) -> tuple[pl.Series, list[Problem]]:
        if raw.dtype in (pl.Date, pl.Datetime):
            values, text = raw.dt.epoch("us") // 10**6, "is not a time"
        elif self.unit == "iso8601":
            values, text = _parse_iso8601(as_text(raw)), "is not an ISO 8601 time"
        else:
            return self._convert_numbers(as_text(raw), _PER_SECOND[self.unit])
        return values, _problem(values.is_null(), text) + _problem(values < 0, "is a time before 1970")

    def _convert_numbers(self, text: pl.Series, per_second: int) -> tuple[pl.Series, list[Problem]]:
        values = text.cast(pl.Int64, strict=False) // per_second
        problems: list[Problem] = []
        failed = values.is_null()
        if failed.any():  # exports write whole seconds as 978300760.0 too
            numbers = text.cast(pl.Float64, strict=False)
            finite = numbers.is_finite().fill_null(False)
            problems += _problem(numbers.is_null(), "is not an integer" if self.unit == "s" else "is not a number")
            problems += _problem(numbers.is_not_null() & ~finite, "is not finite")
            values = values.fill_null((numbers / per_second).floor().cast(pl.Int64, strict=False))
            problems += _problem(values.is_null() & finite, "is out of range")
        problems += _problem(values < 0, "is a time before 1970")
        late = (values > _LATEST).fill_null(False)
        if late.any():
            mostly = 2 * int(late.sum()) > len(late)
            problems.append(Problem(late, self._explain(int(values.filter(late)[0])), fatal=mostly))
        early = ((values >= 0) & (values < _EARLIEST_MOSTLY)).fill_null(False)
        if self.unit != "s" and self.option and 2 * int(early.sum()) > len(early):
            hint = (
                f"is before 1973 in {_UNIT_NAMES[self.unit]}, like most here; set {self.option} to the unit of the file"
            )
            problems.append(Problem(early, hint, fatal=True))
        return values, problems

    def _explain(self, seconds: int) -> str:
        units = list(_UNIT_NAMES)
        step = next((n for n, limit in ((1, 10**14), (2, 10**17)) if seconds <= limit), 3)
        likely = units[min(units.index(self.unit) + step, len(units) - 1)]
        text = f"is after the year 5000 in {_UNIT_NAMES[self.unit]}"
        if likely == self.unit:
            return text
        text += f"; it looks like {_UNIT_NAMES[likely]}"
        return f"{text}: set {self.option}: {likely}" if self.option else text


def _parse_iso8601(text: pl.Series) -> pl.Series:
    """Seconds since 1970, null where the text is not a time. Date and time may be parted by `T` or a space."""
    parts = text.to_frame("t").select(
        pl.col("t")
        .str.strip_chars()
        .str.replace(r"^(\d{4}-\d\d-\d\d)$", "${1}T00:00:00")
        .str.replace(r"^(\d{4}-\d\d-\d\d) ", "${1}T")
        .str.replace(r"[Zz]$", "+00:00")
        .str.replace(r"(T\d\d:\d\d)($|[+-])", "${1}:00${2}")
        .str.replace(r"(T[\d:.]+)$", "${1}+00:00")
    )
    times = parts.to_series().str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", strict=False, time_unit="us", time_zone="UTC")
    return times.dt.epoch("us") // 10**6
