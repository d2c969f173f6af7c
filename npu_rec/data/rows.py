"""Reads tables strictly: a malformed row is an error with file, row and column, or is counted and dropped."""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from npu_rec.data.download import Log
from npu_rec.data.kinds import Kind, Seconds
from npu_rec.data.textio import Block, FileEnd, TextFormat, open_text
from npu_rec.errors import DataError

_PARQUET_ROWS = 1_000_000

ROW = "_row"
"""Column that carries the 1-based line number (in Parquet: row number) a row came from."""


@dataclass(frozen=True, eq=False)
class Column:
    """A wanted column: its name in the result, what it holds, and its name in the file where that differs."""

    name: str
    kind: Kind
    source: str = ""
    hint: str = ""  # what to do when the file lacks it
    optional: bool = False  # a file may lack it, then so does the result

    @property
    def in_file(self) -> str:
        return self.source or self.name


Wanted = Sequence[Column] | Callable[[list[str]], Sequence[Column]]


@dataclass
class Dropped:
    """Malformed rows of one file."""

    rows: int
    first: str  # what was wrong with the first of them

    def __str__(self) -> str:
        return f"{self.rows} malformed rows dropped, the first: {self.first}"


class _Finding(NamedTuple):
    mask: pl.Series  # [rows] Boolean
    describe: Callable[[int], str]  # index of a row -> what is wrong with it
    fatal: bool = False


class Rows:
    """Reads and checks rows; passed to `Recipe.read`.

    Args:
        on_bad_row: `error` raises at the first malformed row, `drop` leaves such rows out and counts them.
        log: takes lines for the person who waits.
        work: an empty folder for decompressed files.
    """

    def __init__(self, on_bad_row: Literal["error", "drop"], log: Log, work: Path) -> None:
        self.dropped: dict[str, Dropped] = {}
        self.log = log
        self._drop = on_bad_row == "drop"
        self._work = work

    def text(self, path: Path, columns: Wanted, layout: TextFormat) -> pl.DataFrame:
        """The wanted columns of a delimited file, plain or .gz, in file order, and `ROW`.

        Args:
            columns: what to read, or a function that says so for the names in the file.

        Raises:
            DataError: for a missing column, a malformed row, a wrong encoding or a truncated file.
        """
        table = open_text(self._decompress(path), path.name, layout)
        places = {column: str(place) for column, place in _places(table.names, columns, path.name).items()}
        last = str(len(table.names) - 1)
        watch_end = table.cut_field is not None and any(
            place == last and isinstance(column.kind, Seconds) for column, place in places.items()
        )
        end = FileEnd(table.cut_field or 0)
        parts = []
        for block in table.blocks:
            if watch_end:
                end.see(block.frame[last])
            parts.append(self._of_block(block, places, len(table.names), path.name))
        frame = pl.concat(parts, rechunk=True) if parts else _empty(places)
        return self._reject_last(frame, path.name) if watch_end and end.is_cut() and len(frame) else frame

    def stream(self, path: Path, columns: Wanted, layout: TextFormat) -> Iterator[pl.DataFrame]:
        """As `text`, some 32 MiB of the file at a time, for files larger than memory; at least one frame."""
        table = open_text(self._decompress(path), path.name, layout)
        places = {column: str(place) for column, place in _places(table.names, columns, path.name).items()}
        frames = (self._of_block(block, places, len(table.names), path.name) for block in table.blocks)
        yield next(frames, _empty(places))
        yield from frames

    def parquet(self, path: Path, columns: Wanted) -> pl.DataFrame:
        """The wanted columns of a Parquet file, and `ROW`. Raises as `text` does."""
        try:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            wanted = list(_places(names, columns, path.name))
            parts, row = [], 1
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[column.in_file for column in wanted]):
                frame = pl.DataFrame(pl.from_arrow(batch))
                rows = pl.int_range(row, row + len(frame), eager=True)
                raw = {column: frame[column.in_file] for column in wanted}
                parts.append(self._convert(path.name, rows, raw, []))
                row += len(frame)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path.name}: not a readable Parquet file, perhaps truncated: {reason}") from None
        return pl.concat(parts, rechunk=True) if parts else _empty(wanted)

    def reject(self, frame: pl.DataFrame, column: str, mask: pl.Series, text: str, file: str) -> pl.DataFrame:
        """Treat rows of an already converted frame as malformed: raise, or return the frame without them.

        Args:
            frame: rows with, if known, their line numbers in `ROW`.
            column: the column at fault; the message is `<file>: row <n>, column <column>: <value> <text>`.
            mask: [rows] Boolean, nulls count as False.
        """
        mask = mask.fill_null(False)
        if not mask.any():
            return frame
        rows = frame[ROW] if ROW in frame.columns else pl.int_range(1, len(frame) + 1, eager=True)
        finding = _Finding(mask, lambda index: _describe(column, frame[column][index], text))
        keep = self._settle(file, rows, [finding])
        return frame if keep is None else frame.filter(keep)

    def report(self) -> None:
        """Log a line for every file that lost rows."""
        for file, lost in self.dropped.items():
            self.log(f"{file}: {lost}")

    def _of_block(self, block: Block, places: dict[Column, str], fields: int, file: str) -> pl.DataFrame:
        raw = {column: block.frame[place] for column, place in places.items()}
        return self._convert(file, block.frame["row"], raw, _shape_finding(block.frame, block.notes, fields))

    def _convert(
        self, file: str, rows: pl.Series, raw: dict[Column, pl.Series], findings: list[_Finding]
    ) -> pl.DataFrame:
        values = {ROW: rows.alias(ROW)}
        for column, text in raw.items():
            converted, problems = column.kind.convert(text)
            values[column.name] = converted.alias(column.name)
            for problem in problems:
                findings.append(_Finding(problem.mask, _describer(column.in_file, text, problem.text), problem.fatal))
        frame = pl.DataFrame(list(values.values()))
        keep = self._settle(file, rows, findings)
        return frame if keep is None else frame.filter(keep)

    def _settle(self, file: str, rows: pl.Series, findings: list[_Finding]) -> pl.Series | None:
        """Raise for the earliest finding, or return the mask of rows that stay (None: all)."""
        if not findings:
            return None
        firsts = [finding.mask.arg_max() or 0 for finding in findings]
        order = min(range(len(findings)), key=lambda n: (not findings[n].fatal, firsts[n], n))
        message = f"row {rows[firsts[order]]}{findings[order].describe(firsts[order])}"
        if findings[order].fatal:
            raise DataError(f"{file}: {message}")
        if not self._drop:
            raise DataError(f"{file}: {message} (data.on_bad_row: drop leaves such rows out and counts them)")
        bad = findings[0].mask
        for finding in findings[1:]:
            bad = bad | finding.mask
        known = self.dropped.setdefault(file, Dropped(0, message))
        known.rows += int(bad.sum())
        return ~bad

    def _reject_last(self, frame: pl.DataFrame, file: str) -> pl.DataFrame:
        mask = pl.int_range(len(frame), eager=True) == len(frame) - 1
        text = ": the file ends in the middle of this row; it is truncated, get it again"
        keep = self._settle(file, frame[ROW], [_Finding(mask, lambda _: text)])
        return frame if keep is None else frame.filter(keep)

    def _decompress(self, path: Path) -> Path:
        if path.suffix != ".gz":
            return path
        target = self._work / path.stem
        try:
            with gzip.open(path, "rb") as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 2**20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path.name}: the .gz file is truncated or damaged ({error}); get it again") from None
        return target


def _places(names: list[str], wanted: Wanted, file: str) -> dict[Column, int]:
    columns = wanted(names) if callable(wanted) else wanted
    present = [column for column in columns if not column.optional or column.in_file in names]
    return {column: _place(names, column, file) for column in present}


def _place(names: Sequence[str], column: Column, file: str) -> int:
    found = [place for place, name in enumerate(names) if name == column.in_file]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{file}: row 1: column {column.in_file!r} stands there {len(found)} times")
    hint = f"; {column.hint}" if column.hint else ""
    raise DataError(f"{file}: no column {column.in_file!r}; found: {', '.join(names)}{hint}")


def _shape_finding(frame: pl.DataFrame, notes: dict[int, str], expected: int) -> list[_Finding]:
    wrong = frame["fields"] != expected
    if not wrong.any():
        return []

    def describe(index: int) -> str:
        count = frame["fields"][index]
        if count == 0:
            return ": " + notes.get(frame["row"][index], "the line is empty")
        return f": {count} field{'s' if count > 1 else ''}, expected {expected}"

    return [_Finding(wrong, describe)]


def _describer(column: str, raw: pl.Series, text: str) -> Callable[[int], str]:
    return lambda index: _describe(column, raw[index], text)


def _describe(column: str, value: object, text: str) -> str:
    if value is None or value == "":
        return f", column {column}: the value is missing"
    shown = repr(value)
    return f", column {column}: {shown if len(shown) <= 60 else shown[:57] + '...'} {text}"


def _empty(columns: Iterable[Column]) -> pl.DataFrame:
    empty = pl.Series(dtype=pl.String)
    frame = {column.name: column.kind.convert(empty)[0] for column in columns}
    return pl.DataFrame({ROW: pl.Series(dtype=pl.Int64), **frame})
