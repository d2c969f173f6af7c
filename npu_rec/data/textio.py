"""Rows of delimited text as blocks of polars columns, with line numbers and no row lost on the way.

polars' own CSV reader pads or cuts rows of the wrong length and does not number lines, so lines are
split here: vectorised where nothing is quoted, by the csv module where something is.
"""

from __future__ import annotations

import csv
import io
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import polars as pl

from npu_rec.errors import DataError

BLOCK_BYTES = 32 * 2**20
_QUOTED_ROWS = 200_000
_TIME_DIGITS = 9  # at least, of times in seconds since 1973


@dataclass(frozen=True)
class TextFormat:
    """How a text table is written."""

    separator: str
    names: tuple[str, ...] = ()  # of the columns of a file without a header
    encoding: str = "utf-8"
    quoted: bool = False  # fields may be quoted with "
    clean_name: Callable[[str], str] = str.strip  # applied to the names in the header


@dataclass
class Block:
    """Consecutive rows. `frame` has `row` (1-based line number), `fields` (how many the line has, 0 where
    `notes` says what is wrong with it) and the text of the fields in columns `"0"`, `"1"`, ..."""

    frame: pl.DataFrame
    notes: dict[int, str] = field(default_factory=dict)


@dataclass
class TextTable:
    """An opened file."""

    names: list[str]
    blocks: Iterator[Block]
    cut_field: int | None  # length of the very last field where the file does not end with a line end


class FileEnd:
    """Tells a truncated file by its last field: a time, with no line end behind it, shorter than all others.

    Args:
        cut: length of that field.
    """

    def __init__(self, cut: int) -> None:
        self._cut = cut
        self._as_short = 0
        self._shortest_other: int | None = None

    def see(self, fields: pl.Series) -> None:
        """Take the last fields of a block into account."""
        lengths = fields.drop_nulls().str.len_bytes().to_numpy()
        longer = lengths[lengths > self._cut]
        self._as_short += len(lengths) - len(longer)
        if len(longer):
            least = int(longer.min())
            self._shortest_other = least if self._shortest_other is None else min(least, self._shortest_other)

    def is_cut(self) -> bool:
        return self._as_short == 1 and (self._shortest_other or 0) >= _TIME_DIGITS


def open_text(path: Path, shown: str, layout: TextFormat) -> TextTable:
    """Open a text table. Line ends are \\n or \\r\\n; empty lines at the end of the file are no rows.

    Raises:
        DataError: when the file is empty or, while reading, not in the stated encoding.
    """
    with path.open("rb") as file:
        end, cut = _content_end(file, layout.separator.encode())
    if end == 0:
        raise DataError(f"{shown}: the file is empty")
    if layout.quoted and _contains_quote(path):
        for _ in _pieces(path, shown, layout.encoding, end):
            pass  # decoded once before, since the csv module cannot say where a byte is wrong
        records = _quoted_records(path, shown, layout)
        names = list(layout.names) or [layout.clean_name(name) for name in _header(records, shown)]
        return TextTable(names, _quoted_blocks(records, len(names)), cut)
    pieces = _pieces(path, shown, layout.encoding, end)
    names = list(layout.names)
    if not names:
        first, text = next(pieces)
        line, line_end, rest = text.partition("\n")
        names = [layout.clean_name(name) for name in line.rstrip("\r").split(layout.separator)]
        pieces = chain([(first + 1, rest)] if line_end else [], pieces)
    return TextTable(names, (_split(row, text, layout.separator, len(names)) for row, text in pieces), cut)


def _content_end(file: io.BufferedReader, separator: bytes) -> tuple[int, int | None]:
    """Where the last line ends, and the length of its last field if no line end follows."""
    size = file.seek(0, io.SEEK_END)
    end, tail = size, b""
    while end > 0:
        start = max(0, end - 2**16)
        file.seek(start)
        tail = file.read(end - start).rstrip(b"\r\n")
        if tail:
            end = start + len(tail)
            break
        end = start
    cut = len(tail.rpartition(b"\n")[2].rpartition(separator)[2]) if end == size and end else None
    return end, cut


def _contains_quote(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(b'"') >= 0


def _pieces(path: Path, shown: str, encoding: str, end: int) -> Iterator[tuple[int, str]]:
    """Whole lines, decoded, without the last line end, and the number of the first of them."""
    row, rest = 1, b""
    with path.open("rb") as file:
        while end > 0:
            block = rest + file.read(min(BLOCK_BYTES, end))
            end -= len(block) - len(rest)
            cut = block.rfind(b"\n") if end > 0 else len(block)
            if cut < 0:
                rest = block
                continue
            text = _decode(block[:cut], shown, encoding, row).replace("\r\n", "\n")
            text = text.removesuffix("\r").removeprefix("\ufeff" if row == 1 else "")
            rest = block[cut + 1 :]
            yield row, text
            row += text.count("\n") + 1


def _decode(block: bytes, shown: str, encoding: str, row: int) -> str:
    try:
        return block.decode(encoding)
    except UnicodeDecodeError as error:
        row += block.count(b"\n", 0, error.start)
        raise DataError(f"{shown}: row {row}: byte 0x{block[error.start]:02x} is not {encoding} text") from None


def _split(row: int, text: str, separator: str, count: int) -> Block:
    lines = pl.Series([text]).str.split("\n").explode()
    parts = lines.str.split_exact(separator, count).struct.unnest()
    parts.columns = [str(n) for n in range(count + 1)]
    wrong = parts[str(count)].is_not_null() | parts[str(count - 1)].is_null()
    fields: pl.Series | pl.Expr = pl.lit(count, pl.UInt32)
    if wrong.any():
        fields = (lines.str.count_matches(separator, literal=True) + 1).set(lines == "", 0)
    rows = pl.int_range(row, row + len(lines), eager=True)
    frame = parts.drop(str(count)).with_columns(rows.alias("row"), fields.alias("fields"))
    return Block(frame)


_Record = tuple[int, list[str], str]  # line number, fields, what is wrong


def _quoted_records(path: Path, shown: str, layout: TextFormat) -> Iterator[_Record]:
    """Records of the csv module; blank lines at the end left out.

    A bad record over several lines is an error even where bad rows are dropped: its quote was opened by mistake and
    took good rows with it.
    """
    expected = len(layout.names)
    encoding = "utf-8-sig" if layout.encoding == "utf-8" else layout.encoding
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(file, delimiter=layout.separator, strict=True)
        blank: list[int] = []
        while True:
            row, fields, note = reader.line_num + 1, [], ""
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                note = f"cannot be read as CSV: {error}"
            expected = expected or len(fields)
            if reader.line_num > row and (note or len(fields) != expected):
                raise DataError(
                    f"{shown}: row {row}: a quote opened here runs to row {reader.line_num}; "
                    "double the quote or remove it"
                )
            if not fields and not note:
                blank.append(row)
                continue
            yield from ((number, [], "") for number in blank)
            blank.clear()
            yield row, fields, note


def _header(records: Iterator[_Record], shown: str) -> list[str]:
    _, fields, note = next(records)
    if note:
        raise DataError(f"{shown}: row 1: {note}")
    return fields


def _quoted_blocks(records: Iterator[_Record], count: int) -> Iterator[Block]:
    rows: list[_Record] = []
    for record in records:
        rows.append(record)
        if len(rows) == _QUOTED_ROWS:
            yield _quoted_block(rows, count)
            rows = []
    if rows:
        yield _quoted_block(rows, count)


def _quoted_block(rows: list[_Record], count: int) -> Block:
    columns = {
        str(n): pl.Series([fields[n] if n < len(fields) else None for _, fields, _ in rows], dtype=pl.String)
        for n in range(count)
    }
    frame = pl.DataFrame(
        {
            "row": pl.Series([row for row, _, _ in rows], dtype=pl.Int64),
            "fields": pl.Series([len(fields) for _, fields, _ in rows], dtype=pl.UInt32),
            **columns,
        }
    )
    return Block(frame, {row: note for row, _, note in rows if note})
