"""The `interactions` recipe: formats, columns, times, features, duplicates."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import polars as pl
import pytest
from test_data_recipes import sequences, store_of, write

from npu_rec.errors import DataError

EVENTS = "user,item,timestamp,kind,note\nbo,x9,3,buy,a\nal,x1,2,view,b\nbo,x1,1,view,c\nal,x9,2,cart,d\n"
SEQUENCES = {"bo": [(2, 1, 0), (1, 3, 2)], "al": [(2, 2, 0), (1, 2, 1)]}  # x9 is 1, x1 is 2
ACTIONS = {"action": "kind", "action_values": ["view", "cart", "buy"]}


@pytest.mark.parametrize("form", ["csv", "tsv", "csv.gz", "quoted", "parquet", "no header", "zip"])
def test_interactions_formats(tmp_path: Path, form: str) -> None:
    folder, options = tmp_path / "in", dict(ACTIONS)
    folder.mkdir()
    source = folder / f"events.{form if form in ('tsv', 'csv.gz', 'parquet') else 'csv'}"
    if form == "csv.gz":
        source.write_bytes(gzip.compress(EVENTS.encode()))
    elif form == "parquet":
        pl.read_csv(EVENTS.encode()).write_parquet(source)
    elif form == "tsv":
        source.write_text(EVENTS.replace(",", "\t"))
    elif form == "no header":
        source.write_text(EVENTS.partition("\n")[2].replace(",", " "))
        options |= {"columns": ["user", "item", "timestamp", "kind", "note"], "separator": " "}
    else:
        source.write_text(
            EVENTS.replace("bo,", '"bo",').replace(",a", ',"a, ""b""\nc"') if form == "quoted" else EVENTS
        )
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
            archive.write(source, "deep/events.csv")
        source = tmp_path / "mine.zip"
    store = store_of("interactions", source, tmp_path, options=options)
    assert sequences(store) == SEQUENCES
    assert store.users([0, 1]) == ["bo", "al"]  # first appearance
    assert store.items["raw_id"].to_pylist() == ["x9", "x1"]
    assert store.manifest["action_values"] == ["view", "cart", "buy"]


def test_interactions_feature_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", events_csv=EVENTS, users_csv="user,age\nal,30\nzoe,\nbo,\n")
    items = 'item,price,name\nx7,1,"Lamp, small"\nx1,2,Chair\n'
    (folder / "items.csv").write_text(items)
    options = {**ACTIONS, "file": "events.csv", "items_file": "items.csv", "users_file": "users.csv", "title": "name"}
    lines: list[str] = []
    store = store_of("interactions", folder, tmp_path, lines.append, options=options)
    assert sequences(store) == SEQUENCES
    assert store.items.to_pylist() == [
        {"item_id": 1, "raw_id": "x9", "title": None, "events": 2, "price": None},
        {"item_id": 2, "raw_id": "x1", "title": "Chair", "events": 2, "price": "2"},
        {"item_id": 3, "raw_id": "x7", "title": "Lamp, small", "events": 0, "price": "1"},
    ]
    assert "items.csv: 1 of 2 items with events are not listed there" in lines
    assert store.user_features is not None
    assert store.user_features.to_pylist() == [{"user": "bo", "age": None}, {"user": "al", "age": "30"}]
    pl.DataFrame({"item": ["x1", "x9"], "size": [1.5, 2.5]}).write_parquet(folder / "items.parquet")
    options |= {"items_file": "items.parquet", "title": None}
    store = store_of("interactions", folder, tmp_path, options=options)
    assert store.items["size"].to_pylist() == [2.5, 1.5]


@pytest.mark.parametrize(
    ("unit", "texts", "seconds"),
    [
        ("s", ["978300760", "978300760.9", "9.7830076e8"], [978300760] * 3),
        ("ms", ["978300760999", "978300760000", "978300760000.0"], [978300760] * 3),
        ("us", ["978300760999999", "978300761000000", "0"], [978300760, 978300761, 0]),
        ("ns", ["978300760999999999", "978300761000000000", "0"], [978300760, 978300761, 0]),
        ("iso8601", ["2000-12-31T22:12:40Z", "2000-12-31 22:12:40.9", "2001-01-01T00:12:40+02:00"], [978300760] * 3),
        ("iso8601", ["2000-12-31", "2000-12-31T00:00+0000", "2000-12-31T00:00:00.5Z"], [978220800] * 3),
    ],
)
def test_interactions_time_units(tmp_path: Path, unit: str, texts: list[str], seconds: list[int]) -> None:
    (tmp_path / "e.csv").write_text(
        "user,item,timestamp\n" + "".join(f"{n},i,{text}\n" for n, text in enumerate(texts))
    )
    store = store_of("interactions", tmp_path / "e.csv", tmp_path, options={"time_unit": unit})
    assert [events[0][1] for events in sequences(store).values()] == seconds


def test_interactions_typed_parquet(tmp_path: Path) -> None:
    times = pl.Series(["2000-12-31T22:12:40.5", "2000-12-31T22:12:39"]).str.to_datetime(time_unit="ns")
    frame = pl.DataFrame({"u": [5.0, 5.0], "i": pl.Series([2**40, 7], dtype=pl.UInt64), "t": times})
    frame.write_parquet(tmp_path / "e.parquet")
    options = {"user": "u", "item": "i", "timestamp": "t"}
    store = store_of("interactions", tmp_path / "e.parquet", tmp_path, options=options)
    assert sequences(store) == {"5": [(2, 978300759), (1, 978300760)]}
    assert store.items["raw_id"].to_pylist() == [str(2**40), "7"]


def test_interactions_without_times_keep_file_order(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user,item\n1,b\n1,a\n1,b\n")
    store = store_of("interactions", tmp_path / "e.csv", tmp_path, options={"timestamp": None})
    assert sequences(store) == {"1": [(1,), (2,), (1,)]}
    assert not store.has_times
    assert store.gather([0], [0], [2]).times is None


@pytest.mark.parametrize(("duplicates", "left"), [("keep", 4), ("drop", 3)])
def test_duplicates_are_counted(tmp_path: Path, duplicates: str, left: int) -> None:
    (tmp_path / "e.csv").write_text("user,item,timestamp\n1,b,5\n1,a,4\n1,b,5\n1,b,6\n")
    lines: list[str] = []
    store = store_of("interactions", tmp_path / "e.csv", tmp_path, lines.append, duplicates=duplicates)
    assert store.num_events == left
    assert store.manifest["counts"]["duplicates"] == 1
    assert any("1 events equal an earlier one" in line for line in lines)


def test_byte_order_mark(tmp_path: Path) -> None:
    for text in ("user,item,timestamp\n1,b,5\n", '"user",item,timestamp\n1,b,5\n'):
        (tmp_path / "e.csv").write_text("\ufeff" + text, encoding="utf-8")
        assert sequences(store_of("interactions", tmp_path / "e.csv", tmp_path)) == {"1": [(1, 5)]}


def test_seconds_taken_for_milliseconds_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", events_csv="user,item,timestamp\n" + "a,x,1600000000\nb,y,1600000001\n")
    with pytest.raises(DataError, match=r"before 1973 in milliseconds.*time_unit"):
        store_of("interactions", source, tmp_path, options={"time_unit": "ms"})


@pytest.mark.parametrize("bad", ['a,"x,5\n', 'a,"x,5\nb,y",6,7\n'])
def test_a_stray_quote_never_swallows_rows(tmp_path: Path, bad: str) -> None:
    source = write(tmp_path / "in", events_csv="user,item,timestamp\na,w,4\n" + bad + "b,y,6\nc,z,7\n")
    with pytest.raises(DataError, match=r"row 3: a quote opened here runs to row"):
        store_of("interactions", source, tmp_path, on_bad_row="drop")


@pytest.mark.parametrize("whose", ["item", "user"])
def test_a_feature_is_not_named_as_the_ids(tmp_path: Path, whose: str) -> None:
    """The events call items skus; the table of items has skus, and another column `item`."""
    events = EVENTS.replace(whose, "id", 1)
    folder = write(tmp_path / "in", events_csv=events, table_csv=f"id,{whose}\nbo,1\nx9,2\n")
    options = {**ACTIONS, "file": "events.csv", f"{whose}s_file": "table.csv", whose: "id"}
    with pytest.raises(DataError, match=rf"table\.csv: has a column '{whose}' besides 'id', the {whose}s; rename one"):
        store_of("interactions", folder, tmp_path, options=options)


def test_other_archives_are_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "events.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"events\.tar\.gz: of archives \.zip alone is read; unpack it"):
        store_of("interactions", tmp_path / "events.tar.gz", tmp_path)
