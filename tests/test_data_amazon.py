"""Amazon's video games as SASRec has them."""

from __future__ import annotations

import gzip
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
