"""Every recipe on small files in the publisher's layout, downloads from a loopback server, and the real files."""

from __future__ import annotations

import gzip
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from npu_rec.config import DataConfig, Section
from npu_rec.data import Column, RawData, RawId, Recipe, Rows, Seconds, SequenceStore, TextFormat, prepare
from npu_rec.errors import ConfigError, DataError
from npu_rec.registry import register

Sequences = dict[Any, list[tuple[Any, ...]]]


def store_of(
    name: str, source: Path | None, out: Path, log: Callable[[str], None] = print, **data: Any
) -> SequenceStore:
    return SequenceStore(prepare(DataConfig(name=name, source=source, dir=out, **data), log=log), check=True)


def sequences(store: SequenceStore) -> Sequences:
    """Raw user id -> (item id, time, action) of the events, without the columns the data set lacks."""
    found = {}
    for row, user in enumerate(store.users(range(len(store)))):
        events = store.gather([row], [0], [store.lengths[row]])
        columns = [events.item_ids, events.times, events.actions]
        found[user] = list(zip(*(column.tolist() for column in columns if column is not None), strict=True))
    return found


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", "-").replace("_", ".")).write_text(text, encoding="latin-1")
    return folder


ML_1M = {
    # User 2 first and unsorted; its items 20 and 10 share a second.
    "ratings_dat": "2::30::5::978300300\n2::20::3::978300200\n1::7::4::978300100\n"
    "2::10::1::978300200\n1::30::2::978300050\n",
    "movies_dat": "7::Caf\u00e9 (1990)::Drama\n10::B (1991)::Comedy|Drama\n20::C, The::Drama\n"
    "30::D::War\n3952::Last::War\n",
    "users_dat": "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n",
}


def test_ml_1m_official_files(tmp_path: Path) -> None:
    store = store_of("ml-1m", write(tmp_path / "in", **ML_1M), tmp_path)
    assert sequences(store) == {
        1: [(30, 978300050, 4), (7, 978300100, 8)],
        2: [(20, 978300200, 6), (10, 978300200, 2), (30, 978300300, 10)],  # a tie keeps the file's order
    }
    assert store.num_items == 3952
    assert store.catalogue("all").tolist() == [7, 10, 20, 30, 3952]
    assert store.catalogue("seen").tolist() == [7, 10, 20, 30]
    assert store.items["title"].to_pylist()[:2] == ["Caf\u00e9 (1990)", "B (1991)"]
    assert store.items["genres"].to_pylist()[1] == "Comedy|Drama"
    assert store.items["raw_id"].to_pylist()[-1] == "3952"
    assert store.user_features is not None
    assert store.user_features.to_pylist()[0] == {
        "user": 1, "gender": "F", "age": "1", "occupation": "10", "zip_code": "48067"
    }  # fmt: skip
    assert store.manifest["counts"]["users_with_fewer_than_3_events"] == 1
    assert "half stars" in store.manifest["actions"]


@pytest.mark.parametrize("packing", ["zip", "gz", "file", "crlf", "no line end"])
def test_ml_1m_packings(tmp_path: Path, packing: str) -> None:
    source = write(tmp_path / "ml-1m", **ML_1M)
    expected = sequences(store_of("ml-1m", source, tmp_path / "plain"))
    if packing == "zip":
        with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
            for path in source.iterdir():
                archive.write(path, f"ml-1m/{path.name}")
            archive.writestr("ml-1m/README", "terms")
        source = tmp_path / "ml-1m.zip"
    elif packing == "gz":
        for path in list(source.iterdir()):
            (source / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        source = tmp_path  # the folder above is searched too
    elif packing == "file":
        source = source / "ratings.dat"
    else:
        for path in source.iterdir():
            text = path.read_bytes()
            path.write_bytes(text.replace(b"\n", b"\r\n") if packing == "crlf" else text.rstrip(b"\n"))
    assert sequences(store_of("ml-1m", source, tmp_path / "out")) == expected


def test_ml_1m_ordered_layout_keeps_the_file_order(tmp_path: Path) -> None:
    rows = "2,30,0,978300300,0\n1,7,4,978300100,1\n2,20,0,978300300,1\n2,10,3,978300400,1\n1,10,nan,978300100,0\n"
    source = write(tmp_path / "in", **{**ML_1M, "ratings_dat": ""})
    (source / "ratings.dat").unlink()
    with gzip.open(source / "ratings.csv.gz", "wt") as file:
        file.write("user,item,rating,timestamp,ts_known\n" + rows)
    store = store_of("ml-1m", source, tmp_path)
    assert sequences(store) == {
        1: [(7, 978300100), (10, 978300100)],
        2: [(30, 978300300), (20, 978300300), (10, 978300400)],
    }
    assert store.has_times
    assert not store.has_actions  # the ratings are no input
    assert store.num_items == 3952

    (source / "ratings.csv").write_text("user,item\n2,30\n1,7\n2,20\n")
    (source / "ratings.csv.gz").unlink()
    assert sequences(store_of("ml-1m", source, tmp_path)) == {1: [(7,)], 2: [(30,), (20,)]}

    (source / "ratings.csv").write_text("user,item,timestamp\n2,30,978300300\n2,20,978300200\n")
    assert sequences(store_of("ml-1m", source, tmp_path)) == {2: [(20, 978300200), (30, 978300300)]}

    text = "user,item,timestamp,ts_known\n2,30,978300300,0\n2,20,978300200,1\n"
    (source / "ratings.csv").write_text(text)
    lines: list[str] = []
    store = store_of("ml-1m", source, tmp_path, lines.append)
    assert sequences(store) == {2: [(30, 978300300), (20, 978300200)]}
    assert store.manifest["counts"]["times_out_of_order"] == 1
    assert any("1 events are earlier than the one before" in line for line in lines)


def test_ml_1m_labels_are_taken_out_of_an_archive(tmp_path: Path) -> None:
    source = write(tmp_path / "in", **{**ML_1M, "ratings_dat": ""})
    (source / "ratings.dat").unlink()
    (source / "ratings.csv").write_text("user,item,timestamp,ts_known\n1,7,978300100,1\n1,10,978300200,0\n")
    (source / "sample.csv").write_text("user,item,rating,timestamp\n1,10,4,978300300\n")
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for path in source.iterdir():
            archive.write(path, path.name)
    store = store_of("ml-1m", tmp_path / "mine.zip", tmp_path, options={"labels_file": "sample.csv"})
    assert sequences(store) == {1: [(7, 978300100, 0), (10, 978300300, 8)]}  # half stars


def test_ml_20m(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    ratings = "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,0.5,1112484676\n2,29,5.0,1112484676\n"
    movies = 'movieId,title,genres\n2,Jumanji (1995),Adventure|Children\n29,"City of ""Lost"" Children, The",Drama\n'
    movies += "131262,Last,(no genres listed)\n"
    write(folder, ratings_csv=ratings, movies_csv=movies)
    store = store_of("ml-20m", folder, tmp_path)
    assert sequences(store) == {1: [(29, 1112484676, 1), (2, 1112486027, 7)], 2: [(29, 1112484676, 10)]}
    assert store.items["title"].to_pylist() == ["Jumanji (1995)", 'City of "Lost" Children, The', "Last"]
    assert store.num_items == 131262
    assert store.item_counts()[[2, 29, 131262]].tolist() == [1, 2, 0]


U_ITEM = "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n267|unknown||||1" + "|0" * 18
ML_100K_GROUPLENS = {
    "u_data": "196\t1\t3\t881250949\n186\t267\t3\t891717742\n196\t267\t5\t881250948\n",
    "u_item": U_ITEM + "\n\n",  # GroupLens' file ends with an empty line
    "u_user": "186|24|M|technician|85711\n196|53|F|other|94043\n",
}
ML_100K_RECBOLE = {
    "ml__100k_inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ML_100K_GROUPLENS["u_data"],
    "ml__100k_item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n267\tunknown\t\tunknown\n",
    "ml__100k_user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "186\t24\tM\ttechnician\t85711\n196\t53\tF\tother\t94043\n",
}


def test_ml_100k_in_both_layouts(tmp_path: Path) -> None:
    stores = [
        store_of("ml-100k", write(tmp_path / "u", **ML_100K_GROUPLENS), tmp_path),
        store_of("ml-100k", write(tmp_path / "r", **ML_100K_RECBOLE), tmp_path),
    ]
    for store in stores:
        assert sequences(store) == {186: [(267, 891717742, 6)], 196: [(267, 881250948, 10), (1, 881250949, 6)]}
        assert store.num_items == 267
        assert store.items["genres"].to_pylist() == ["Animation|Children's|Comedy", "unknown"]
        assert store.items["release_year"].to_pylist() == ["1995", None]
    first, second = (store.user_features for store in stores)
    assert first is not None
    assert first.equals(second)


def test_amazon_books_filter_is_metas(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    draws = rng.integers([0, 0, 1, 10**9], [30, 40, 6, 2 * 10**9], size=(220, 4)).tolist()
    rows = [(f"A{user:02d}", f"{item:010d}", f"{rating}.0", time) for user, item, rating, time in draws]
    write(tmp_path / "in", **{"ratings_Books.csv": ""})
    text = "".join(f"{user},{item},{rating},{time}\n" for user, item, rating, time in rows)
    (tmp_path / "in" / "ratings_Books.csv").write_text(text)
    users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
    kept = [row for row in rows if users[row[0]] >= 5 and items[row[1]] >= 5]
    ids = {raw: place for place, raw in enumerate(sorted({row[1] for row in kept}), 1)}
    expected: Sequences = {}
    for user, item, rating, time in sorted(kept, key=lambda row: row[3]):
        expected.setdefault(user, []).append((ids[item], time, int(2 * float(rating))))
    expected = {user: events for user, events in expected.items() if len(events) >= 5}
    assert 0 < len(expected) < len({row[0] for row in kept}) < len(users)  # both filters take something out
    store = store_of("amazon-books", tmp_path / "in", tmp_path)
    assert sequences(store) == expected
    assert store.num_items == len(ids)
    assert len(store.catalogue("all")) == len(ids)
    assert dict(zip(store.items["raw_id"].to_pylist(), store.items["item_id"].to_pylist(), strict=True)) == ids
    assert store.manifest["counts"]["events_before_filter"] == 220


class ShopOptions(Section):
    """Options of the outside recipe."""

    chunks: bool = False
    broken: bool = False


@register("data", "test-shop", options=ShopOptions)
class Shop(Recipe):
    """A recipe such as another package would register."""

    description = "test"
    terms = "none"

    def read(self, source: Path, rows: Rows) -> RawData:
        if not self.options.chunks:
            columns = [Column("user", RawId()), Column("item", RawId()), Column("time", Seconds(), source="ts")]
            return RawData(rows.text(source / "sales.csv", columns, TextFormat(",", quoted=True)), remap=True)
        users = [[1, 2, 1], [2 if self.options.broken else 3]]
        return RawData(pl.DataFrame({"user": user, "item": [9] * len(user)}) for user in users)


def test_outside_recipe(tmp_path: Path) -> None:
    write(tmp_path / "in", sales_csv="user,item,ts\nb,y,2\na,z,1\nb,x,1\n")
    assert sequences(store_of("test-shop", tmp_path / "in", tmp_path)) == {"b": [(3, 1), (1, 2)], "a": [(2, 1)]}
    streamed = store_of("test-shop", tmp_path / "in", tmp_path, options={"chunks": True})
    assert sequences(streamed) == {1: [(9,), (9,)], 2: [(9,)], 3: [(9,)]}
    assert streamed.catalogue("all").tolist() == [9]
    with pytest.raises(DataError, match="two of the recipe's chunks"):
        store_of("test-shop", tmp_path / "in", tmp_path, options={"chunks": True, "broken": True})
    with pytest.raises(DataError, match=r"set data\.source"):
        store_of("test-shop", None, tmp_path)
    with pytest.raises(ConfigError, match=r"data.options.chunk: unknown key; did you mean `data.options.chunks`"):
        store_of("test-shop", None, tmp_path, options={"chunk": True})
    with pytest.raises(ConfigError, match="did you mean 'ml-1m'"):
        store_of("ml-1n", None, tmp_path)


def test_real_ml_100k(real: Path, tmp_path: Path) -> None:
    store = store_of("ml-100k", real / "ml-100k", tmp_path)
    assert (store.num_sequences, store.num_events, store.num_items) == (943, 100_000, 1682)
    assert store.lengths.min() == 20
    assert len(store.catalogue("all")) == len(store.catalogue("seen")) == 1682
    for user, events in sequences(store).items():
        times = [event[1] for event in events]
        assert times == sorted(times), user


def test_real_ml_1m(real: Path, tmp_path: Path) -> None:
    store = store_of("ml-1m", real / "ml-1m", tmp_path)
    assert (store.num_sequences, store.num_events, store.num_items) == (6040, 999_611, 3952)
    assert len(store.catalogue("all")) == 3883
    assert len(store.catalogue("seen")) == 3416
    assert store.has_times
    assert not store.has_actions
    expected = (
        pl.read_csv(real / "ml-1m" / "ratings.csv.gz").group_by("user", maintain_order=True).agg("item", "timestamp")
    )
    rows = {user: row for row, user in enumerate(store.users(range(len(store))))}
    order = np.array([rows[user] for user in expected["user"]])
    events = store.gather(order, np.zeros_like(order), store.lengths[order])
    assert np.array_equal(events.item_ids, expected["item"].explode().to_numpy())
    assert np.array_equal(events.times, expected["timestamp"].explode().to_numpy())
