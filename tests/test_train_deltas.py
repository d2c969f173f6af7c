"""`train.delta_every`: a checkpoint and the deltas after it give the weights of the next checkpoint."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree

import pytest
import torch
from torch import Tensor

from npu_rec.config import Config
from npu_rec.errors import ConfigError
from npu_rec.train import load_run_config, train
from npu_rec.train.checkpoint import apply_delta, open_checkpoint, open_delta

SETTINGS = (
    "train.delta_every=2",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=9",
    "train.max_steps=6",
    "train.batch_size=1",
    "task.options.num_negatives=1",
    "embedding.optimizer=rowwise_adagrad",
)


def config_of(shop: Path, *more: str) -> Config:
    return load_run_config(shop, [*SETTINGS, *more])


def rows_of(path: Path, *, delta: bool) -> dict[int, Tensor]:
    stored = open_delta(path) if delta else open_checkpoint(path)
    return {
        int(key): row
        for piece in stored.keyed("model.encoder.items")
        for key, row in zip(piece.keys, piece.columns["weight"], strict=True)
    }


def test_rows_and_weights_of_a_static_table(shop: Path, tmp_path: Path) -> None:
    train(config_of(shop), run_dir=tmp_path)
    weights = open_checkpoint(tmp_path / "checkpoints" / "step-2").tensors("model")
    for mark, step in ((2, 4), (4, 6)):
        delta = open_delta(tmp_path / "deltas" / f"step-{mark}-{step}")
        assert (delta.mark_step, delta.step) == (mark, step)
        assert 0 < delta.keyed_rows("model.encoder.items") < len(weights["encoder.items.weight"])
        assert apply_delta(weights, mark, delta) == []
        expected = open_checkpoint(tmp_path / "checkpoints" / f"step-{step}").tensors("model")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("more", [(), ("embedding.tier=disk", "embedding.rows=36", "embedding.eviction=lru")])
def test_rows_of_a_dynamic_table(shop: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    train(config_of(shop, "embedding.kind=dynamic", *more), run_dir=tmp_path)
    rows = rows_of(tmp_path / "checkpoints" / "step-2", delta=False)
    for mark, step in ((2, 4), (4, 6)):
        changed = rows_of(tmp_path / "deltas" / f"step-{mark}-{step}", delta=True)
        expected = rows_of(tmp_path / "checkpoints" / f"step-{step}", delta=False)
        moved = {key for key, row in expected.items() if key not in rows or not torch.equal(rows[key], row)}
        assert moved <= changed.keys()
        rows |= changed
        assert rows.keys() == expected.keys()
        assert all(torch.equal(rows[key], expected[key]) for key in expected)


def test_a_restart_goes_on_with_the_chain(shop: Path, tmp_path: Path) -> None:
    more = ("train.delta_every=4", "train.checkpoint_every=3", "embedding.kind=dynamic")
    train(config_of(shop, *more, "train.max_steps=7"), run_dir=tmp_path / "whole")
    train(config_of(shop, *more, "train.max_steps=5"), run_dir=tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut" / "deltas").iterdir()) == ["step-0-4", "step-4-5"]
    rmtree(tmp_path / "cut" / "checkpoints" / "step-5")  # as if killed before it was written
    train(config_of(shop, *more, "train.max_steps=7"), run_dir=tmp_path / "cut", resume="auto")
    for name in ("step-0-4", "step-4-7"):
        whole, cut = (rows_of(tmp_path / run / "deltas" / name, delta=True) for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert len(list((tmp_path / "cut" / "deltas").iterdir())) == 2


def test_divided_rows_are_refused(shop: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.delta_every needs .* placement row_wise or table_wise"):
        config_of(shop, "embedding.placement=column_wise")
