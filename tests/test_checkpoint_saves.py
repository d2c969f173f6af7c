"""Saves that end early, and how a checkpoint is cut into files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_rows, documents, rows_of

from npu_rec.distributed.world import World
from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint import (
    AsyncSaver,
    Keyed,
    Shard,
    Snapshot,
    disk,
    keyed_files,
    list_steps,
    open_checkpoint,
    remove_partial,
    save_snapshot,
)
from npu_rec.train.checkpoint.plan import Block, plan_files


def test_a_program_that_ends_without_waiting_ends_its_save(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from npu_rec.distributed.world import ALONE\n"
        "from npu_rec.train.checkpoint import AsyncSaver, Snapshot\n"
        "documents = {'state.json': '{}', 'config.yaml': ''}\n"
        "snapshot = Snapshot({'model.x': torch.ones(1000, 1000)}, {}, documents)\n"
        "AsyncSaver(ALONE).save(Path(sys.argv[1]), snapshot)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "step-1"], check=True, timeout=60)
    assert open_checkpoint(tmp_path / "step-1").tensors("model")["x"].sum() == 1e6


def fail_after_a_save(path: Path, snapshot: Snapshot) -> None:
    with AsyncSaver(World()) as saver:
        saver.save(path, snapshot)
        raise ZeroDivisionError


def test_a_failed_training_keeps_its_error(tmp_path: Path) -> None:
    """Leaving the saver by an error waits for the save and tells of the first error alone."""
    snapshot = Snapshot({"model.x": torch.ones(3)}, {}, documents(1))
    with pytest.raises(ZeroDivisionError):
        fail_after_a_save(tmp_path / "step-1", snapshot)
    open_checkpoint(tmp_path / "step-1")
    saver = AsyncSaver(World())
    saver.save(tmp_path / "step-2", Snapshot({}, {}, {"no folder/state.json": ""}))
    with pytest.raises(CheckpointError, match="cannot be written"):
        saver.wait()
    assert list_steps(tmp_path) == [1]
    assert not list(tmp_path.glob(".*"))


def test_what_a_save_was_about_to_replace_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames of a save at a step that exists."""
    path, rename = tmp_path / "step-1", Path.rename
    save_snapshot(path, Snapshot({"model.x": torch.ones(3)}, {}, documents(1)))

    def killed(self: Path, target: Path) -> None:
        if self == disk.partial_of(path):
            raise KeyboardInterrupt
        rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save_snapshot(path, Snapshot({"model.x": torch.zeros(3)}, {}, documents(1)))
    assert list_steps(tmp_path) == []
    remove_partial(tmp_path)
    assert open_checkpoint(path).tensors("model")["x"].tolist() == [1.0] * 3
    save_snapshot(path, Snapshot({"model.x": torch.zeros(3)}, {}, documents(1)))
    assert open_checkpoint(path).tensors("model")["x"].tolist() == [0.0] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_large_tensors_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_rec.train.checkpoint.plan.FILE_BYTES", 100)
    monkeypatch.setattr(keyed_files, "PIECE_BYTES", 100)
    tensors = {"model.a": torch.randn(10, 6), "model.b": torch.randn(3), "model.c": torch.randn(2, 40)}
    rows = rows_of(torch.arange(9))
    save_snapshot(tmp_path / "step-1", Snapshot(dict(tensors), {"model.users": rows}, documents(1)))
    names = sorted(p.name for p in (tmp_path / "step-1").glob("model-*"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) == 5  # 240 bytes in three, 320 in two: a row is never cut
    checkpoint = open_checkpoint(tmp_path / "step-1")
    for name, value in checkpoint.tensors("model").items():
        assert torch.equal(value, tensors[f"model.{name}"])
    pieces = list(checkpoint.keyed("model.users"))
    assert [len(piece.keys) for piece in pieces] == [3, 3, 3]  # rows of 32 bytes
    assert_rows(pieces, torch.arange(9))


def test_copies_of_a_block_are_dealt_out() -> None:
    """Two replicas of two blocks on four ranks, as of hybrid FSDP: every rank writes as much."""

    def block(name: str, half: int) -> Block:
        return Block(name, (4 * half, 0), (4, 2), (8, 2), 4, is_whole=False)

    blocks = [[block("a", rank % 2), block("b", rank % 2)] for rank in range(4)]
    files = plan_files(blocks)
    assert sorted((b.name, b.offsets) for mine in files for file in mine for b in file) == [
        ("a", (0, 0)),
        ("a", (4, 0)),
        ("b", (0, 0)),
        ("b", (4, 0)),
    ]
    assert [sum(b.bytes for file in mine for b in file) for mine in files] == [32] * 4


@pytest.mark.parametrize(
    ("local", "offsets", "shape"), [((2, 3), (0,), (2, 3)), ((2, 3), (9, 0), (10, 3)), ((2,), (-1,), (10,))]
)
def test_a_block_lies_in_its_tensor(local: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"does not lie in"):
        Shard(torch.zeros(local), offsets, shape)


def test_rows_by_key_are_checked() -> None:
    with pytest.raises(ValueError, match=r"keys must be \[n\] int64"):
        Keyed(torch.arange(3).int(), {})
    with pytest.raises(ValueError, match="a row a key"):
        Keyed(torch.arange(3), {"weight": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="another name"):
        Keyed(torch.arange(3), {"keys": torch.ones(3, 4)})
