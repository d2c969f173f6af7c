"""Amazon's video games as SASRec has them, and ratings of several categories as domains."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_data_recipes import sequences, store_of, write

from npu_rec.config import Config
from npu_rec.errors import ConfigError, DataError
from npu_rec.train.trainer import train

VIDEO = "1 3\n1 1\n3 2\n3 3\n3 1\n"


@pytest.mark.parametrize("form", ["folder", "file", "gz"])
def test_amazon_games(tmp_path: Path, form: str) -> None:
    source = write(tmp_path / "in", Video_txt=VIDEO)
    if form == "gz":
        (source / "Video.txt").unlink()
        (source / "Video.txt.gz").write_bytes(gzip.compress(VIDEO.encode()))
    lines: list[str] = []
    store = store_of("amazon-games", source / "Video.txt" if form == "file" else source, tmp_path, lines.append)
    assert sequences(store) == {1: [(3,), (1,)], 3: [(2,), (3,), (1,)]}
    assert store.items["raw_id"].to_pylist() == ["1", "2", "3"]
    assert not store.has_times
    assert "amazon-games: note: the publisher's file has 287107 events, this one 5" in lines


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("3 0", "row 2, column item: '0' is the id that stands for padding; ids start at 1"),
        ("3", "row 2: 1 field, expected 2"),
        ("3 2 1.0", "row 2: 3 fields, expected 2"),
        ("x 2", "row 2, column user: 'x' is not an integer"),
    ],
)
def test_malformed_amazon_games(tmp_path: Path, line: str, expected: str) -> None:
    source = write(tmp_path / "in", Video_txt=f"1 3\n{line}\n{VIDEO}")
    with pytest.raises(DataError) as caught:
        store_of("amazon-games", source, tmp_path)
    assert str(caught.value).startswith(f"Video.txt: {expected}")
    assert store_of("amazon-games", source, tmp_path, on_bad_row="drop").num_events == 6


def test_amazon_games_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not downloaded \(Video.txt, which SASRec's authors .*: set data\.source"):
        store_of("amazon-games", None, tmp_path)


def test_a_time_bias_without_times_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Video.txt").write_text("".join(f"{user} {1 + user % 3}\n" for user in range(5) for _ in range(4)))
    data = {"name": "amazon-games", "source": tmp_path / "Video.txt", "dir": tmp_path}
    config = Config.model_validate({"data": data, "device": {"backend": "cpu", "threads": 1}})
    with pytest.raises(ConfigError, match=r"amazon-games has no times.*set model.options.bias to position"):
        train(config, run_dir=tmp_path / "run")


def test_real_amazon_games(real: Path, tmp_path: Path) -> None:
    store = store_of("amazon-games", real / "amazon-games", tmp_path)
    assert (store.num_sequences, store.num_events, store.num_items) == (31_013, 287_107, 23_715)
    assert len(store.catalogue("seen")) == 23_715
    with gzip.open(real / "amazon-games" / "Video.txt.gz") as file:
        expected = pl.read_csv(file.read(), separator=" ", has_header=False, new_columns=["user", "item"])
    everything = np.arange(len(store))
    assert store.users(everything) == expected["user"].unique(maintain_order=True).to_list()
    events = store.gather(everything, np.zeros_like(everything), store.lengths)
    assert np.array_equal(events.item_ids, expected["item"].to_numpy())


BOOKS = "A1,0001,5.0,1400000300\nA2,0002,3.0,1400000100\nA1,0002,4.0,1400000500\n"
GAMES = "A2,B7,1.0,1400000200\nA1,B7,2.0,1400000400\nA1,0001,2.0,1400000400\nA3,B8,2.0,1400000000\n"
DOMAINS = {"games": "ratings_Video_Games.csv", "books": "ratings_Books.csv"}
EVERYTHING = {"min_item_events": 1, "min_user_events": 1}


def write_ratings(folder: Path, books: str = BOOKS, games: str = GAMES) -> Path:
    folder.mkdir()
    for name, text in (("books", books), ("games", games)):
        (folder / DOMAINS[name]).write_text(text)
    return folder


def test_domains_join_users_and_keep_items_apart(tmp_path: Path) -> None:
    source = write_ratings(tmp_path / "in")
    store = store_of("amazon-domains", source, tmp_path, options={"domains": DOMAINS, **EVERYTHING})
    assert store.items.select(["item_id", "raw_id", "events", "domain"]).to_pylist() == [
        {"item_id": 1, "raw_id": "books/0001", "events": 1, "domain": "books"},
        {"item_id": 2, "raw_id": "books/0002", "events": 2, "domain": "books"},
        {"item_id": 3, "raw_id": "games/0001", "events": 1, "domain": "games"},
        {"item_id": 4, "raw_id": "games/B7", "events": 2, "domain": "games"},
        {"item_id": 5, "raw_id": "games/B8", "events": 1, "domain": "games"},
    ]
    t = 1_400_000_000
    assert sequences(store) == {
        "A1": [(1, t + 300, 10), (4, t + 400, 4), (3, t + 400, 4), (2, t + 500, 8)],
        "A2": [(2, t + 100, 6), (4, t + 200, 2)],
        "A3": [(5, t, 4)],
    }


def test_domains_of_2018_begin_with_the_item(tmp_path: Path) -> None:
    expected = sequences(
        store_of("amazon-domains", write_ratings(tmp_path / "a"), tmp_path, options={"domains": DOMAINS, **EVERYTHING})
    )
    swapped = [
        "".join(",".join([item, user, *rest]) + "\n" for user, item, *rest in (row.split(",") for row in text.split()))
        for text in (BOOKS, GAMES)
    ]
    source = write_ratings(tmp_path / "b", *swapped)
    options = {"domains": DOMAINS, "layout": "2018", **EVERYTHING}
    assert sequences(store_of("amazon-domains", source, tmp_path, options=options)) == expected
    for wrong, layout in ((source, "2014"), (tmp_path / "a", "2018")):
        with pytest.raises(DataError, match=r"ratings_Books.csv: most items, .* set data.options.layout"):
            store_of("amazon-domains", wrong, tmp_path, options={**options, "layout": layout})


def test_the_filter_of_domains_counts_users_over_all_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    draws = rng.integers([0, 0, 0, 1, 10**9], [2, 60, 40, 6, 2 * 10**9], size=(500, 5)).tolist()
    rows = [(f"{'bg'[domain]}/{item}", f"A{user}", 2 * stars, time) for domain, user, item, stars, time in draws]
    texts = [
        "".join(f"{user},{item[2:]},{action / 2},{time}\n" for item, user, action, time in rows if item[0] == domain)
        for domain in "bg"
    ]
    items, users = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
    kept = [row for row in rows if items[row[0]] >= 6 and users[row[1]] >= 7]
    left = Counter(row[1] for row in kept)
    ids = {raw: place for place, raw in enumerate(sorted({row[0] for row in kept}), 1)}
    expected: dict[str, list[tuple[int, int, int]]] = {}
    for item, user, action, time in sorted(kept, key=lambda row: row[3]):
        if left[user] >= 7:
            expected.setdefault(user, []).append((ids[item], time, action))
    assert 0 < len(expected) < len(left) < len(users)  # both filters take something out
    options = {"domains": {"b": "b.csv", "g": "g.csv"}, "min_item_events": 6, "min_user_events": 7}
    store = store_of(
        "amazon-domains", write(tmp_path / "in", b_csv=texts[0], g_csv=texts[1]), tmp_path, options=options
    )
    assert sequences(store) == expected
    assert dict(zip(store.items["raw_id"].to_pylist(), store.items["item_id"].to_pylist(), strict=True)) == ids
    assert store.items["domain"].to_pylist() == [raw[0] for raw in sorted(ids)]


def test_faults_of_domains(tmp_path: Path) -> None:
    source = write_ratings(tmp_path / "in", games=GAMES + "A3,B8,7.0,1400000000\n")
    with pytest.raises(DataError, match=r"ratings_Video_Games.csv: row 5, column rating: '7.0' is not a rating"):
        store_of("amazon-domains", source, tmp_path, options={"domains": DOMAINS})
    options = {"domains": {**DOMAINS, "toys": "ratings_Toys.csv"}}
    with pytest.raises(DataError, match=r"no ratings_Toys.csv there \(it holds the domain toys\)"):
        store_of("amazon-domains", source, tmp_path, options=options)
    with pytest.raises(ConfigError, match=r"data.options.domains: names no domain"):
        store_of("amazon-domains", source, tmp_path)
    with pytest.raises(ConfigError, match=r"data.options.domains"):
        store_of("amazon-domains", source, tmp_path, options={"domains": {"a/b": "x.csv"}})
    with pytest.raises(DataError, match=r"not downloaded \(ratings of categories: jmcauley"):
        store_of("amazon-domains", None, tmp_path, options={"domains": DOMAINS})
