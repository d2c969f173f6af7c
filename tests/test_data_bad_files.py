"""Malformed, truncated and missing files: a DataError that names file, row and column, or counted drops."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_recipes import ML_1M, ML_100K_GROUPLENS, sequences, store_of, write

from npu_rec.config import DataConfig
from npu_rec.data import prepare
from npu_rec.errors import DataError

HINT = "(data.on_bad_row: drop leaves such rows out and counts them)"


def message(name: str, source: Path, **data: Any) -> str:
    """The error of preparing, which leaves nothing behind."""
    out = source.parent / "prepared"
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(name=name, source=source, dir=out, **data), log=print)
    assert not out.exists() or not list(out.iterdir())
    text = str(caught.value)
    assert "\n" not in text
    return text


BAD_RATINGS = {
    "1::7::4::abc": "row 2, column timestamp: 'abc' is not an integer",
    "1::7::4": "row 2: 3 fields, expected 4",
    "1::7::4::978300100::9": "row 2: 5 fields, expected 4",
    "1,7,4,978300100": "row 2: 1 field, expected 4",
    "": "row 2: the line is empty",
    "1::7::4::": "row 2, column timestamp: the value is missing",
    "::7::4::978300100": "row 2, column user: the value is missing",
    "-1::7::4::978300100": "row 2, column user: '-1' is a negative id",
    "1::-7::4::978300100": "row 2, column item: '-7' is a negative id",
    "1::0::4::978300100": "row 2, column item: '0' is the id that stands for padding; ids start at 1",
    "1::2147483648::4::978300100": "row 2, column item: '2147483648' is larger than the largest id, 2147483647",
    "1::99999999999999999999::4::978300100": "row 2, column item: '99999999999999999999' is out of range",
    "1.5::7::4::978300100": "row 2, column user: '1.5' is not an integer",
    "1:: 7::4::978300100": "row 2, column item: ' 7' is not an integer",
    "1::8::4::978300100": "row 2, column item: 8 is not listed in movies.dat",
    "1::7::nan::978300100": "row 2, column rating: 'nan' is not finite",
    "1::7::-inf::978300100": "row 2, column rating: '-inf' is not finite",
    "1::7::good::978300100": "row 2, column rating: 'good' is not a number",
    "1::7::3.3::978300100": "row 2, column rating: '3.3' is not a rating (0.5, 1, ... 5)",
    "1::7::5.5::978300100": "row 2, column rating: '5.5' is not a rating (0.5, 1, ... 5)",
    "1::7::4::-5": "row 2, column timestamp: '-5' is a time before 1970",
    "1::7::4::inf": "row 2, column timestamp: 'inf' is not finite",
    "1::7::4::978300100000": "row 2, column timestamp: '978300100000' is after the year 5000 in seconds; "
    "it looks like milliseconds",
    "1::7::x::y": "row 2, column rating: 'x' is not a number",
}


@pytest.mark.parametrize("line", BAD_RATINGS)
def test_malformed_rating(tmp_path: Path, line: str) -> None:
    first, *rest = ML_1M["ratings_dat"].splitlines()
    source = write(tmp_path / "in", **{**ML_1M, "ratings_dat": "\n".join([first, line, *rest, line]) + "\n"})
    if line == "":
        rest.append("1::7::4::978300999")  # empty lines at the end are no rows
        source = write(source, ratings_dat="\n".join([first, line, *rest[:-1], line, rest[-1]]) + "\n")
    assert message("ml-1m", source) == f"ratings.dat: {BAD_RATINGS[line]} {HINT}"
    lines: list[str] = []
    store = store_of("ml-1m", source, tmp_path / "drop", lines.append, on_bad_row="drop")
    good = write(tmp_path / "good", **{**ML_1M, "ratings_dat": "\n".join([first, *rest])})
    assert sequences(store) == sequences(store_of("ml-1m", good, tmp_path))
    assert store.manifest["counts"]["bad_rows_dropped"] == 2
    assert store.manifest["bad_rows"] == {"ratings.dat": {"dropped": 2, "first": BAD_RATINGS[line]}}
    assert f"ratings.dat: 2 malformed rows dropped, the first: {BAD_RATINGS[line]}" in lines


def test_the_earliest_of_many_is_told(tmp_path: Path) -> None:
    text = "1::7::x::978300100\n1::7::4\n-1::7::4::y\n" + ML_1M["ratings_dat"]
    source = write(tmp_path / "in", **{**ML_1M, "ratings_dat": text})
    assert message("ml-1m", source).startswith("ratings.dat: row 1, column rating: 'x'")
    store = store_of("ml-1m", source, tmp_path, on_bad_row="drop")
    assert store.manifest["counts"]["bad_rows_dropped"] == 3  # a row with two faults counts once


def test_row_numbers_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_rec.data.textio.BLOCK_BYTES", 40)
    monkeypatch.setattr("npu_rec.data.textio._QUOTED_ROWS", 3)
    lines = [f"1::7::4::{978300100 + n}" for n in range(50)]
    source = write(tmp_path / "in", **{**ML_1M, "ratings_dat": "\n".join(lines)})
    assert store_of("ml-1m", source, tmp_path).num_events == 50
    lines[37] += "x"
    write(source, ratings_dat="\r\n".join(lines) + "\r\n\r\n\n")
    assert message("ml-1m", source).startswith("ratings.dat: row 38, column timestamp: '978300137x' is not")
    rows = ["user,item,timestamp", *(f'"u",i,{n}' for n in range(20)), '"two\nlines",i,1', "u,i,z"]
    (tmp_path / "e.csv").write_text("\n".join(rows))
    assert message("interactions", tmp_path / "e.csv").startswith("e.csv: row 24, column timestamp: 'z' is not")


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("movies.dat", "7::A::Drama\n-3::B::War\n", "movies.dat: row 2, column item: '-3' is a negative id"),
        ("movies.dat", "7::A::Drama\n7::B::War\n", "movies.dat: row 2, column item: 7 is listed a second time"),
        ("movies.dat", "7::A\n", "movies.dat: row 1: 2 fields, expected 3"),
        ("users.dat", "1::F::1::10\n", "users.dat: row 1: 4 fields, expected 5"),
        ("users.dat", "", "users.dat: the file is empty"),
        ("ratings.dat", "\n\n", "ratings.dat: the file is empty"),
    ],
)
def test_malformed_lists(tmp_path: Path, file: str, text: str, expected: str) -> None:
    source = write(tmp_path / "in", **ML_1M)
    (source / file).write_text(text)
    assert message("ml-1m", source).startswith(expected)


def test_missing_files(tmp_path: Path) -> None:
    source = write(tmp_path / "in", **ML_1M)
    (source / "users.dat").unlink()  # features only
    assert store_of("ml-1m", source, tmp_path).user_features is None
    (source / "movies.dat").unlink()
    assert "no movies.dat there (it lists the movies, the catalogue)" in message("ml-1m", source)
    (source / "ratings.dat").unlink()
    assert "no ratings.dat or ratings.csv there" in message("ml-1m", source)
    assert message("ml-1m", tmp_path / "nowhere").endswith("nowhere: no such file or folder")
    assert "found none; set data.options.file" in message("interactions", source)
    assert "x.csv: no such file (named in data.options)" in message("interactions", source, options={"file": "x.csv"})


def test_truncated_text(tmp_path: Path) -> None:
    """Cut anywhere inside the last row, the file is refused."""
    whole = ML_1M["ratings_dat"]
    start = whole.rindex("\n", 0, -1) + 1
    for end in range(start + 1, len(whole) - 1):
        source = write(tmp_path / "in", **{**ML_1M, "ratings_dat": whole[:end]})
        assert message("ml-1m", source).startswith("ratings.dat: row 5"), whole[start:end]
    assert "row 5: the file ends in the middle of this row" in message("ml-1m", source)
    assert store_of("ml-1m", source, tmp_path, on_bad_row="drop").manifest["counts"]["bad_rows_dropped"] == 1


def test_truncated_gzip(tmp_path: Path) -> None:
    source = write(tmp_path / "in", **ML_1M)
    packed = gzip.compress((ML_1M["ratings_dat"] * 50).encode())
    (source / "ratings.dat").unlink()
    broken = [packed[: len(packed) // 2], packed[:-4], packed[:-8] + b"12345678", b"no gzip at all", packed[:5]]
    for body in broken:
        (source / "ratings.dat.gz").write_bytes(body)
        assert "ratings.dat.gz: the .gz file is truncated or damaged" in message("ml-1m", source, on_bad_row="drop")


def test_truncated_zip(tmp_path: Path) -> None:
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name, text in ML_1M.items():
            packed.writestr(f"ml-1m/{name.replace('_', '.')}", text.encode("latin-1") * 5)
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"978300300")] ^= 1
    for body in (whole[: len(whole) // 2], whole[:-30], bytes(flipped), b"no zip", b""):
        archive.write_bytes(body)
        assert "ml-1m.zip: the archive is truncated or damaged" in message("ml-1m", archive)
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("a/ratings.dat", "x")
        packed.writestr("b/ratings.dat", "x")
    assert "holds several files named ratings.dat" in message("ml-1m", archive)
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("README", "x")
    assert "no ratings.dat or ratings.csv there" in message("ml-1m", archive)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    frame = pl.DataFrame({"user": [1, 2], "item": [None, 4], "timestamp": [5, 6]})
    frame.write_parquet(path)
    assert message("interactions", path).startswith("e.parquet: row 1, column item: the value is missing")
    path.write_bytes(path.read_bytes()[:-20])
    assert "e.parquet: not a readable Parquet file, perhaps truncated" in message("interactions", path)
    frame.head(0).write_parquet(path)
    assert "e.parquet: no events" in message("interactions", path)
    frame.drop("timestamp").write_parquet(path)
    assert "no column 'timestamp'; found: user, item; set data.options.timestamp" in message("interactions", path)
    frame.with_columns(item=1, timestamp=pl.lit(float("nan"))).write_parquet(path)
    assert "row 1, column timestamp: nan is not finite" in message("interactions", path)


GOOD = "user,item,timestamp\na,x,1\n"


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("user,item\na,x\n", {}, "e.csv: no column 'timestamp'; found: user, item; set data.options.timestamp"),
        ("user,item,item,timestamp\na,x,y,1\n", {}, "e.csv: row 1: column 'item' stands there 2 times"),
        ("user,item,timestamp\n", {}, "e.csv: no events"),
        (GOOD + ",x,2\n", {}, "e.csv: row 3, column user: the value is missing"),
        (GOOD + "a,x\n", {}, "e.csv: row 3: 2 fields, expected 3"),
        (GOOD + '"a,x,2\n', {}, "e.csv: row 3: cannot be read as CSV: unexpected end of data"),
        (GOOD + '"a"b,x,2\n', {}, "e.csv: row 3: cannot be read as CSV: ',' expected after '\"'"),
        (GOOD + '"a",x,,2\n', {}, "e.csv: row 3: 4 fields, expected 3"),
        (GOOD + '\n"a",x,2\n', {}, "e.csv: row 3: the line is empty"),
        (GOOD + "a,\xe9,2\n", {}, "e.csv: row 3: byte 0xe9 is not utf-8 text"),
        (GOOD + 'a,"\xe9",2\n', {}, "e.csv: row 3: byte 0xe9 is not utf-8 text"),
        (GOOD + "a,x,yesterday\n", {"time_unit": "iso8601"}, "e.csv: row 2, column timestamp: '1' is not an ISO 8601"),
        (GOOD + "a,x,1e400\n", {}, "e.csv: row 3, column timestamp: '1e400' is not finite"),
        (GOOD + "a,x,1e30\n", {}, "e.csv: row 3, column timestamp: '1e30' is out of range"),
        (GOOD, {"action": "item"}, "e.csv: row 2, column item: 'x' is not an integer"),
        (GOOD, {"action": "user", "action_values": ["b"], "user": "item", "item": "timestamp", "timestamp": None},
         "e.csv: row 2, column user: 'a' is not one of b"),
    ],
)  # fmt: skip
def test_malformed_csv(tmp_path: Path, text: str, options: dict[str, Any], expected: str) -> None:
    path = tmp_path / "e.csv"
    path.write_text(text, encoding="latin-1")
    if options.get("action") == "item":
        options = {**options, "item": "user", "user": "timestamp", "timestamp": None}
    assert message("interactions", path, options=options).startswith(expected)


def test_wrong_time_unit_is_never_dropped(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text("user,item,timestamp\n" + "a,x,1600000000000\n" * 3)
    for mode in ("error", "drop"):
        text = message("interactions", path, on_bad_row=mode)
        assert "row 2, column timestamp: '1600000000000'" in text
        assert "it looks like milliseconds: set data.options.time_unit: ms" in text
    path.write_text("user,item,timestamp\n" + "a,x,1600000000000000000\n" * 3)
    assert "nanoseconds: set data.options.time_unit: ns" in message("interactions", path, options={"time_unit": "ms"})
    path.write_text("user,item,timestamp\na,x,1\na,x,2\na,x,1600000000000\n")  # one odd row is a bad row
    assert store_of("interactions", path, tmp_path, on_bad_row="drop").num_events == 2


def test_malformed_ml_100k(tmp_path: Path) -> None:
    source = write(tmp_path / "in", **{**ML_100K_GROUPLENS, "u_data": "1\t1\t3\t881250949\n1 1 3 881250949\n"})
    assert message("ml-100k", source).startswith("u.data: row 2: 1 field, expected 4")
    write(source, u_data="1\t1\t3\t881250949\n", u_item="1|A\n")
    assert message("ml-100k", source).startswith("u.item: row 1: 2 fields, expected 24")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["error", "drop"]))
def test_any_damage_is_an_error_or_a_count(tmp_path: Path, data: st.DataObject, mode: str) -> None:
    """Bytes cut, changed or put in anywhere: never a traceback, never a row lost unseen."""
    body = bytearray(ML_1M["ratings_dat"].encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(len(body) - 1, 0)))
        new = data.draw(st.binary(max_size=3) | st.sampled_from([b"::", b"\n", b"\r\n", b"-", b"9" * 12, b"\0", b'"']))
        body[place : place + data.draw(st.integers(0, 30))] = new
    source = write(tmp_path / "in", **ML_1M)
    (source / "ratings.dat").write_bytes(bytes(body))
    out = tmp_path / "out"
    try:
        store = store_of("ml-1m", source, out, lambda line: None, on_bad_row=mode)
    except DataError as error:
        refusal = str(error)
    else:
        refusal = ""
        rows = bytes(body).rstrip(b"\r\n").count(b"\n") + 1
        assert store.num_events + store.manifest["counts"]["bad_rows_dropped"] == rows
    assert refusal == "" or refusal.startswith("ratings.dat: ")


def test_nothing_left(tmp_path: Path) -> None:
    source = write(tmp_path / "in", **{**ML_1M, "ratings_dat": "1::7::4\n"})
    text = message("ml-1m", source, on_bad_row="drop")
    assert text == "ratings.dat: no events left; 1 malformed rows dropped, the first: row 1: 3 fields, expected 4"
