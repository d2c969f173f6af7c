"""Training with tables that are updated in the backward pass (`embedding.optimizer`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from npu_rec.embedding import StaticTable, TableSpec
from npu_rec.embedding.placement import BlockPlacement
from npu_rec.errors import ConfigError, TrainingError
from npu_rec.tasks import Retrieval, build_task
from npu_rec.train import evaluate, load_run_config, train
from npu_rec.train.checkpoint import list_steps, open_checkpoint
from npu_rec.train.optim import attach_row_optimizers
from npu_rec.train.setup import open_data

SPARSE = ["sgd", "rowwise_adagrad", "rowwise_adam"]


def run(shop: Path, folder: Path, *overrides: str, resume: str | None = None) -> Any:
    return train(load_run_config(shop, list(overrides)), run_dir=folder, resume=resume)


def tensors(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """Weights and optimiser state of a checkpoint, the newest by default."""
    step = list_steps(folder / "checkpoints")[-1] if step is None else step
    checkpoint = open_checkpoint(folder / "checkpoints" / f"step-{step}")
    return {f"{group}.{k}": v for group in ("model", "optimizer") for k, v in checkpoint.tensors(group).items()}


@pytest.mark.parametrize(("name", "lr"), [("sgd", 10.0), ("rowwise_adagrad", 0.05), ("rowwise_adam", 0.005)])
def test_training_learns(shop: Path, tmp_path: Path, name: str, lr: float) -> None:
    options = (f"embedding.optimizer={name}", f"embedding.lr={lr}", "train.epochs=12", "train.lr=5e-3")
    result = run(shop, tmp_path / "a", *options)
    assert result.metrics["test"]["hr@10"] > 0.5  # chance is 1/4
    again = evaluate(load_run_config(shop, list(options)), result.checkpoint)
    assert again.metrics["test"] == result.metrics["test"]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("stop", [3, 6])
def test_stopped_and_resumed_equals_undisturbed(shop: Path, tmp_path: Path, name: str, stop: int) -> None:
    options = (f"embedding.optimizer={name}", "train.epochs=2", "train.checkpoint_every=1", "train.keep_checkpoints=50")
    run(shop, tmp_path / "whole", *options)
    run(shop, tmp_path / "parts", *options, f"train.max_steps={stop}")
    run(shop, tmp_path / "parts", *options, resume="auto")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    state = {key.rpartition("/")[2] for key in whole if "items.weight/" in key}
    assert state == {"sgd": {"step"}, "rowwise_adagrad": {"square", "step"}}.get(name, {"square", "momentum", "step"})
    assert int(whole["optimizer.encoder.items.weight/step"]) == 8


def test_only_rows_of_the_batch_change(shop: Path, tmp_path: Path) -> None:
    config = (
        "embedding.optimizer=rowwise_adam",
        "train.max_steps=1",
        "train.batch_size=1",
        "task.options.num_negatives=1",
    )
    run(shop, tmp_path / "none", *config, "train.lr=1e-30")
    run(shop, tmp_path / "one", *config)
    before, after = (tensors(tmp_path / name)["model.encoder.items.weight"] for name in ("none", "one"))
    changed = (before != after).any(1)
    assert 2 <= int(changed.sum()) < changed.shape[0]
    assert not changed[0]


def test_one_step_of_sgd_equals_a_step_along_the_dense_gradient(shop: Path, tmp_path: Path) -> None:
    config = load_run_config(shop, ["embedding.optimizer=sgd", "embedding.lr=0.5"])
    data = open_data(config)
    batch = data.splits["train"].batch(np.arange(16), "none")
    fused, dense = (build_task(config, data.facts) for _ in range(2))
    (rows,) = attach_row_optimizers(fused, config, tmp_path)
    for task in (fused, dense):
        losses, weights = task.loss(task.prepare(batch, 0))
        (losses / weights).backward()
    table, gradient = fused.get_parameter("encoder.items.weight"), dense.get_parameter("encoder.items.weight").grad
    assert rows.step == 1  # though inputs and candidates share the table
    assert table.grad is None
    assert gradient is not None
    expected = dense.get_parameter("encoder.items.weight") - 0.5 * gradient
    torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_loss_that_is_not_finite_leaves_the_table_alone(
    shop: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Retrieval.loss
    calls = []

    def broken(self: Retrieval, *arguments: Any) -> Any:
        calls.append(self.encoder.items.weight.detach().clone())
        losses, weights = loss(self, *arguments)
        return (losses * torch.nan if len(calls) == 2 else losses), weights

    monkeypatch.setattr(Retrieval, "loss", broken)
    options = ("embedding.optimizer=rowwise_adagrad", f"train.nan={what}", "train.max_steps=3")
    if what == "stop":
        with pytest.raises(TrainingError, match=r"step 2 .*loss nan.*Lower train.lr or embedding.lr, set .*clip: row"):
            run(shop, tmp_path / "a", *options)
        return
    run(shop, tmp_path / "a", *options)
    assert not torch.equal(calls[0], calls[1])
    assert torch.equal(calls[1], calls[2])
    assert int(tensors(tmp_path / "a")["optimizer.encoder.items.weight/step"]) == 2


def test_per_row_clipping_bounds_every_row(shop: Path, tmp_path: Path) -> None:
    options = ("embedding.optimizer=sgd", "embedding.lr=1.0", "train.max_steps=1")
    run(shop, tmp_path / "none", *options[:1], "embedding.lr=1e-30", options[2])
    run(shop, tmp_path / "row", *options, "train.clip=row", "train.clip_norm=1e-3")
    run(shop, tmp_path / "dense", *options, "train.clip=dense", "train.clip_norm=1e-3")
    start, row, dense = (tensors(tmp_path / n)["model.encoder.items.weight"] for n in ("none", "row", "dense"))
    assert float((row - start).norm(dim=1).max()) == pytest.approx(1e-3, rel=1e-3)
    assert float((dense - start).norm(dim=1).max()) > 2e-3


def test_dense_clipping_leaves_the_table_out_of_the_norm(shop: Path, tmp_path: Path) -> None:
    norms = {}
    for clip in ("global", "dense"):
        run(shop, tmp_path / clip, "train.max_steps=1", f"train.clip={clip}", "train.clip_norm=1e-3")
        line = (tmp_path / clip / "metrics.jsonl").read_text().splitlines()[0]
        norms[clip] = float(line.split('"gradient_norm": ')[1].split(",")[0])
    assert norms["dense"] < norms["global"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["embedding.optimizer=sgd", "train.accumulate=2"], r"train\.accumulate: embedding\.optimizer sgd .*2 batches"),
        (["embedding.optimizer=sgd", "train.clip_norm=1"], r"train\.clip_norm: .*set train\.clip to dense or row"),
        (["train.clip=row", "train.clip_norm=1"], r"train\.clip: row needs a sparse embedding\.optimizer"),
        (["train.clip=dense"], r"train\.clip: dense .*train\.clip_norm.*not set"),
        (["embedding.lr=0.1"], r"embedding\.lr is for the sparse optimisers"),
        (["embedding.optimizer=adam"], r"embedding\.optimizer"),
    ],
)
def test_what_does_not_go_together_is_a_config_error(shop: Path, options: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_run_config(shop, options)


def test_a_table_without_optimizer_has_an_ordinary_gradient() -> None:
    table = StaticTable(TableSpec("t", 5, 3, seed=0), BlockPlacement("row_wise", 5, 3, ranks=1))
    table(torch.tensor([1, 1])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0]
