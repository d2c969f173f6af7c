"""The store: gathering, catalogues, integrity; and when data is prepared anew."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_recipes import ML_1M, sequences, write

from npu_rec.config import DataConfig
from npu_rec.data import SequenceStore, data_dir, prepare
from npu_rec.data.manifest import FORMAT, seal
from npu_rec.data.shards import Sequences, ShardWriter
from npu_rec.errors import DataError


def build(
    folder: Path, lengths: list[int], shard_events: int, *, times: bool = True, actions: bool = True
) -> SequenceStore:
    """A store of random events, written in two blocks."""
    rng = np.random.default_rng(len(lengths))
    writer = ShardWriter(folder, shard_events)
    folder.mkdir(parents=True)
    half = len(lengths) // 2
    for first, part in ((0, lengths[:half]), (half, lengths[half:])):
        total = sum(part)
        columns = [rng.integers(1, 50, total) for _ in range(3)]
        block = Sequences(
            users=pa.array([f"u{n}" for n in range(first, first + len(part))], pa.string()),
            lengths=np.array(part, np.int64),
            item_ids=columns[0],
            times=columns[1] if times else None,
            actions=columns[2] if actions else None,
        )
        writer.add(block)
    writer.close()
    described = {"num_items": 49, "has_times": times, "has_actions": actions, "shards": writer.files}
    seal(folder, {"format": FORMAT, **described})
    return SequenceStore(folder)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], int, list[tuple[int, int, int]]]:
    """Lengths of sequences, events of a shard, and (sequence, start, stop) to gather."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    wanted = []
    for _ in range(draw(st.integers(0, 10))):
        sequence = draw(st.integers(0, len(lengths) - 1))
        start = draw(st.integers(0, lengths[sequence]))
        wanted.append((sequence, start, draw(st.integers(start, lengths[sequence]))))
    return lengths, draw(st.integers(1, 40)), wanted


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests(), st.booleans(), st.booleans())
def test_gather_is_the_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, request_: tuple[Any, ...], times: bool, actions: bool
) -> None:
    lengths, shard_events, wanted = request_
    store = build(tmp_path_factory.mktemp("s") / "data", lengths, shard_events, times=times, actions=actions)
    assert store.lengths.tolist() == lengths
    assert (store.num_sequences, store.num_events) == (len(lengths), sum(lengths))
    tables = [pa.ipc.open_file(store.path / file).read_all() for file in store.manifest["shards"]]
    for table in tables:
        assert len(table) == 1 or sum(map(len, table["item_ids"].to_pylist())) <= shard_events
    columns: dict[str, list[list[int]]] = {}
    for name, present in (("item_ids", True), ("times", times), ("actions", actions)):
        columns[name] = [row for table in tables if present for row in table[name].to_pylist()]
    found = store.gather(*(np.array(wanted, np.int64).reshape(-1, 3).T))
    for name, rows in columns.items():
        values = getattr(found, name)
        if not rows:
            assert values is None
            continue
        assert values.dtype == np.int64
        assert values.tolist() == [event for row, start, stop in wanted for event in rows[row][start:stop]]
    assert store.users([row for row, _, _ in wanted]) == [f"u{row}" for row, _, _ in wanted]


def test_gather_refuses_what_is_out_of_range(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [3, 0, 5], 100)
    for sequence, start, stop in ((3, 0, 0), (-1, 0, 0), (0, 0, 4), (0, 2, 1), (0, -1, 2), (1, 0, 1)):
        with pytest.raises(IndexError):
            store.gather([sequence], [start], [stop])


def test_views_are_not_copies_and_stores_pickle(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [3, 0, 5], 100)
    column = store._shards[0].item_ids
    assert not column.flags.writeable
    assert not column.flags.owndata
    again = pickle.loads(pickle.dumps(store))
    assert again.gather([2], [1], [4]).item_ids.tolist() == store.gather([2], [1], [4]).item_ids.tolist()


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(name="ml-1m", source=write(tmp_path / "in", **ML_1M), dir=tmp_path / "data")


def stamp(path: Path) -> int:
    return (path / "manifest.json").stat().st_ino


def test_catalogue_and_counts(config: DataConfig) -> None:
    store = SequenceStore(prepare(config), check=True)
    assert store.catalogue("all").tolist() == [7, 10, 20, 30, 3952]
    assert store.catalogue("seen").tolist() == [7, 10, 20, 30]
    counts = store.item_counts()
    assert counts.shape == (3953,)
    assert counts.dtype == np.int64
    assert counts[[0, 7, 10, 20, 30, 3952]].tolist() == [0, 1, 1, 1, 2, 0]
    assert counts.sum() == store.num_events
    names = ["item_id", "raw_id", "title", "events", "genres"]
    assert store.items.schema.names == names
    assert [store.items.schema.field(name).type for name in names[:4]] == [
        pa.int64(),
        pa.string(),
        pa.string(),
        pa.int64(),
    ]
    schema = pa.ipc.open_file(store.path / "sequences-00000.arrow").schema
    assert schema.field("times").type == pa.large_list(pa.int64())
    assert schema.field("user").type == pa.int64()


def test_unchanged_data_is_used_again(config: DataConfig) -> None:
    first = prepare(config)
    inode = stamp(first)
    assert prepare(config) == first
    assert stamp(first) == inode
    assert prepare(config.model_copy(update={"catalogue": "seen"})) == first  # a way of reading, not of preparing
    assert prepare(config, refresh=True) == first
    assert stamp(first) != inode
    assert [path.name for path in config.dir.iterdir()] == [first.name]  # type: ignore[union-attr]


def test_changes_make_it_anew(config: DataConfig) -> None:
    assert config.source is not None
    made = {prepare(config)}
    for change in ({"on_bad_row": "drop"}, {"duplicates": "drop"}):
        made.add(prepare(config.model_copy(update=change)))
    (config.source / "notes.txt").write_text("no part of the data set")
    assert prepare(config) in made
    os.utime(config.source / "movies.dat", (1, 1))
    made.add(prepare(config))
    with (config.source / "ratings.dat").open("a") as file:
        file.write("3::7::1::978300999\n")
    made.add(prepare(config))
    (config.source / "users.dat").unlink()
    made.add(prepare(config))
    assert len(made) == 6
    options = [{"users": 3}, {"users": 4}, {"users": 3, "seed": 1}, {"users": 3}]
    assert len({prepare(DataConfig(name="synthetic", dir=config.dir, options=given)) for given in options}) == 3


def test_damage_is_found(config: DataConfig) -> None:
    path = prepare(config)
    good = sequences(SequenceStore(path))
    shard = path / "sequences-00000.arrow"
    body = bytearray(shard.read_bytes())
    body[body.index((978300050).to_bytes(8, "little"))] ^= 1
    shard.write_bytes(body)
    SequenceStore(path)  # the size is right
    with pytest.raises(DataError, match=r"sequences-00000.arrow: damaged, its SHA-256 differs"):
        SequenceStore(path, check=True)
    lines: list[str] = []
    assert prepare(config, log=lines.append) == path
    assert any("making it anew" in line for line in lines)
    assert sequences(SequenceStore(path, check=True)) == good

    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"bytes, not .*prepare the data again"):
        SequenceStore(path)
    shard.unlink()
    with pytest.raises(DataError, match="missing, not"):
        SequenceStore(path)
    for text, expected in (
        ("{", "damaged"),
        (json.dumps({"files": {}, "format": 99}), "format 99, this version reads"),
    ):
        (path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=expected):
            SequenceStore(path)
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match="not a prepared data set"):
        SequenceStore(path)
    assert sequences(SequenceStore(prepare(config))) == good


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both get the same intact folder and leave nothing else."""
    code = (
        "import sys; from npu_rec.config import DataConfig; from npu_rec.data import prepare\n"
        f"config = DataConfig(name='synthetic', dir={str(tmp_path)!r}, options={{'users': 3000}})\n"
        "sys.stdin.readline(); print(prepare(config))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate("go\n", timeout=60)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(paths) == 1
    assert SequenceStore(paths.pop(), check=True).num_sequences == 3000
    assert len(list(tmp_path.iterdir())) == 1


def test_where_data_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NPU_REC_HOME", raising=False)
    assert data_dir(DataConfig()) == Path.home() / ".cache" / "npu-rec" / "data"
    monkeypatch.setenv("NPU_REC_HOME", str(tmp_path))
    assert data_dir(DataConfig()) == tmp_path / "data"
    assert data_dir(DataConfig(dir=Path("/elsewhere"))) == Path("/elsewhere")


def test_a_place_that_cannot_be_written(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"ml-1m: cannot be prepared: .*file"):
        prepare(config.model_copy(update={"dir": tmp_path / "file" / "data"}))
