"""What outlives a run: the best checkpoint, rows by id in warm starts and conversions, deltas; what may change."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from npu_rec.errors import CheckpointError, StorageError
from npu_rec.tasks import Retrieval
from npu_rec.train import evaluate, load_run_config, train
from npu_rec.train.checkpoint import AsyncSaver, list_steps, open_checkpoint
from npu_rec.train.convert import convert
from npu_rec.train.position import check_same_run
from npu_rec.train.run_dir import RunDirectory

DYNAMIC = ("embedding.kind=dynamic", "embedding.optimizer=rowwise_adagrad")


def run(shop: Path, folder: Path, *overrides: str, resume: str | None = None) -> Any:
    return train(load_run_config(shop, list(overrides)), run_dir=folder, resume=resume)


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def test_the_best_checkpoint_stays_until_the_next_best_is_written(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch is better than the one before; the disk is full at the third."""
    save, validation = AsyncSaver.save, iter(range(1, 9))

    def full(self: AsyncSaver, path: Path, snapshot: Any) -> None:
        if path.name == "step-12":
            raise CheckpointError("no space left")
        save(self, path, snapshot)

    def rising(self: Retrieval, observed: Tensor, names: list[str]) -> dict[str, float]:
        return dict.fromkeys(names, next(validation) / 10)

    monkeypatch.setattr(AsyncSaver, "save", full)
    monkeypatch.setattr(Retrieval, "metrics", rising)
    with pytest.raises(CheckpointError, match="no space left"):
        run(shop, tmp_path, "train.epochs=4", "train.keep_checkpoints=1")
    (step,) = list_steps(tmp_path / "checkpoints")
    assert open_checkpoint(tmp_path / "checkpoints" / f"step-{step}").state["position"]["best_step"] == step == 8


def test_a_best_checkpoint_that_is_gone_is_chosen_anew(
    shop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(shop, tmp_path, "train.epochs=3", "train.lr=1e-9", "train.keep_checkpoints=9")
    checkpoints = tmp_path / "checkpoints"
    best = open_checkpoint(checkpoints / "step-12").state["position"]["best_step"]
    assert best < 12
    shutil.rmtree(checkpoints / f"step-{best}")
    with caplog.at_level(logging.WARNING, "npu_rec"):
        again = run(shop, tmp_path, "train.epochs=4", "train.lr=1e-9", resume=str(checkpoints / "step-12"))
    assert f"step-{best}, the best so far, is no longer there: the best is chosen from here on" in caplog.text
    assert again.checkpoint.name == "step-16"


def test_the_test_line_has_the_epoch_that_is_tested(shop: Path, tmp_path: Path) -> None:
    run(shop, tmp_path / "a", "train.epochs=3", "train.lr=1e-9")
    (tested,) = lines(tmp_path / "a", "test")
    assert tested["epoch"] == next(e["epoch"] for e in lines(tmp_path / "a", "valid") if e["step"] == tested["step"])
    run(shop, tmp_path / "b", "train.max_steps=2", "eval.protocol=meta")
    assert [line["epoch"] for line in lines(tmp_path / "b", "test")] == [1]


def test_options_that_came_later_have_their_defaults(shop: Path, tmp_path: Path) -> None:
    """A checkpoint of an earlier version states no `ssl_weight`."""
    result = run(shop, tmp_path, "train.max_steps=1")
    stored = result.checkpoint / "config.yaml"
    kept = [line for line in stored.read_text().splitlines() if "ssl_" not in line]
    assert len(kept) < len(stored.read_text().splitlines())
    stored.write_text("\n".join(kept))
    check_same_run(load_run_config(shop), open_checkpoint_unchecked(result.checkpoint))


def open_checkpoint_unchecked(path: Path) -> Any:
    """What `check_same_run` needs of a checkpoint whose hashes are no longer those of its files."""
    return type("Found", (), {"path": path, "config_path": path / "config.yaml"})()


@pytest.mark.parametrize("more", [(), ("embedding.tier=host",)])
def test_rows_by_id_start_a_new_run_as_unused(shop: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Where rows must leave to make room, those of the other run can, as if no step had used them."""
    small = ("train.batch_size=1", "task.options.num_negatives=1", "train.seed=3")
    first = run(shop, tmp_path / "a", *DYNAMIC, *small, "train.max_steps=9", "data.fraction=0.02")
    before = list(open_checkpoint(first.checkpoint).keyed("model.encoder.items"))
    had = sum(len(piece.keys) for piece in before)
    assert had < 40
    assert max(int(piece.columns["last_step"].max()) for piece in before) > 1
    warm = (f"train.init_from={first.checkpoint}", f"embedding.rows={had}", "embedding.eviction=lru", *more)
    run(shop, tmp_path / "b", *DYNAMIC, *small, *warm, "train.max_steps=1", "train.seed=4")
    after = list(open_checkpoint(tmp_path / "b" / "checkpoints" / "step-1").keyed("model.encoder.items"))
    assert max(int(piece.columns["last_step"].max()) for piece in after) == 1
    assert any(bool((piece.columns["square"] == 0).any()) for piece in after)
    found = {int(key) for piece in after for key in piece.keys}
    assert found - {int(key) for piece in before for key in piece.keys}  # new ones have come
    assert len(found) == had if not more else len(found) > had


def test_rows_by_id_are_converted_with_the_rest(shop: Path, tmp_path: Path) -> None:
    config = load_run_config(shop, list(DYNAMIC))
    trained = train(config, run_dir=tmp_path / "run")
    converted = convert(trained.checkpoint, tmp_path / "weights", config)
    rows = [
        {int(k): row for piece in open_checkpoint(path).keyed("model.encoder.items")
         for k, row in zip(piece.keys, piece.columns["weight"], strict=True)}
        for path in (trained.checkpoint, converted)
    ]  # fmt: skip
    assert rows[0].keys() == rows[1].keys()
    assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0])
    metrics = evaluate(config, converted).metrics
    assert metrics["test"] == trained.metrics["test"]
    with pytest.raises(CheckpointError, match=r"encoder\.items keeps rows by id, .*give a folder as the target"):
        convert(trained.checkpoint, tmp_path / "weights.safetensors", config)


def test_a_conversion_is_whole_or_not_there(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(shop)
    trained = train(config, run_dir=tmp_path / "run")
    target = tmp_path / "out" / "weights.safetensors"

    def cut(weights: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("npu_rec.train.convert.save_file", cut)
        with pytest.raises(CheckpointError, match=f"{target}: cannot be written: no space left"):
            convert(trained.checkpoint, target, config)
    assert not list(target.parent.iterdir())
    convert(trained.checkpoint, target, config)
    stored = open_checkpoint(trained.checkpoint).tensors("model")
    assert all(torch.equal(stored[name], value) for name, value in load_file(target).items())


def test_deltas_of_a_sitting_without_a_checkpoint_are_dropped(shop: Path, tmp_path: Path) -> None:
    settings = ("train.delta_every=1", "embedding.optimizer=rowwise_adagrad", "train.max_steps=2")
    stale = tmp_path / "deltas" / "step-0-7"
    stale.mkdir(parents=True)
    run(shop, tmp_path, *settings, resume="auto")
    assert {path.name for path in (tmp_path / "deltas").iterdir()} == {"step-0-1", "step-1-2"}


def test_a_full_disk_is_one_line(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be written
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written: "):
        RunDirectory(tmp_path).log("train", 1, 1, {"loss": 1.0})
