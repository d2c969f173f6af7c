"""The training loop on a small data set."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from npu_rec.errors import CheckpointError, ConfigError, TrainingError
from npu_rec.tasks import Retrieval
from npu_rec.train import evaluate, load_run_config, train
from npu_rec.train.checkpoint import list_steps, open_checkpoint
from npu_rec.train.optim import learning_rate


def run(shop: Path, folder: Path, *overrides: str, resume: str | None = None) -> Any:
    return train(load_run_config(shop, list(overrides)), run_dir=folder, resume=resume)


def weights(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    step = list_steps(folder / "checkpoints")[-1] if step is None else step
    return open_checkpoint(folder / "checkpoints" / f"step-{step}").tensors("model")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_directory_holds_what_design_promises(shop: Path, tmp_path: Path) -> None:
    result = run(shop, tmp_path / "a")
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "report.html"} <= files
    rows = lines(tmp_path / "a")
    assert {row["split"] for row in rows} == {"train", "valid", "test"}
    assert all("loss" in row for row in rows if row["split"] == "train")
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, 9))  # 60 users, batches of 16, 2 epochs
    assert "<svg" in result.report.read_text()
    assert "http" not in result.report.read_text().split("<h2>Configuration")[0].replace(
        "http://www.w3.org", ""
    ).replace("http://purl.org", "").replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    assert result.checkpoint.is_dir()


def test_training_learns(shop: Path, tmp_path: Path) -> None:
    result = run(shop, tmp_path / "a", "train.epochs=12", "train.lr=5e-3")
    losses = [row["epoch_loss"] for row in lines(tmp_path / "a") if "epoch_loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert result.metrics["test"]["hr@10"] > 0.5  # the next item is one of three neighbours; chance is 1/4


def test_ranks_of_evaluation_give_its_metrics(shop: Path, tmp_path: Path) -> None:
    result = run(shop, tmp_path / "a")
    written = tmp_path / "ranks.csv"
    metrics = evaluate(load_run_config(shop), result.checkpoint, ranks=written).metrics
    table = pl.read_csv(written)
    assert table.columns == ["split", "user", "rank"]
    for split in ("valid", "test"):
        rows = table.filter(pl.col("split") == split)
        assert rows["user"].n_unique() == len(rows) > 0
        assert set(rows["user"]) <= {f"u{i}" for i in range(60)}
        assert float((rows["rank"] <= 10).mean()) == pytest.approx(metrics[split]["hr@10"])
        assert float((1 / rows["rank"]).mean()) == pytest.approx(metrics[split]["mrr"])
    with pytest.raises(ConfigError, match="there is no folder"):
        evaluate(load_run_config(shop), result.checkpoint, ranks=tmp_path / "no" / "ranks.csv")


def test_same_seed_same_bits_and_other_seed_other_weights(shop: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(shop, tmp_path / name, "train.epochs=1", f"train.seed={seed}")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_stopped_and_resumed_equals_undisturbed(shop: Path, tmp_path: Path, stop: int) -> None:
    options = ("train.epochs=3", "train.checkpoint_every=1", "train.keep_checkpoints=50")
    whole = run(shop, tmp_path / "whole", *options)
    run(shop, tmp_path / "parts", *options, f"train.max_steps={stop}")
    rest = run(shop, tmp_path / "parts", *options, resume="auto")
    assert rest.resumed_from_step == stop
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert rest.metrics == whole.metrics

    def without_times(folder: Path) -> list[tuple[Any, ...]]:
        return [(r["split"], r["step"], r.get("epoch_loss"), r.get("hr@10")) for r in lines(folder) if "lr" not in r]

    # the run that was stopped by max_steps also closed its part with a report of its own
    assert set(without_times(tmp_path / "whole")) <= set(without_times(tmp_path / "parts"))


def test_resuming_a_finished_run_reports_it_again(shop: Path, tmp_path: Path) -> None:
    first = run(shop, tmp_path / "a")
    again = run(shop, tmp_path / "a", resume="auto")
    assert again.metrics == first.metrics
    assert again.resumed_from_step == list_steps(tmp_path / "a" / "checkpoints")[-1]
    longer = run(shop, tmp_path / "a", "train.epochs=3", resume="auto")
    assert longer.extra["steps"] == 12


def test_resume_auto_without_a_run_starts_one(shop: Path, tmp_path: Path) -> None:
    assert run(shop, tmp_path / "a", "train.epochs=1", resume="auto").resumed_from_step is None


def test_a_used_run_directory_is_not_overwritten(shop: Path, tmp_path: Path) -> None:
    run(shop, tmp_path / "a", "train.epochs=1")
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume auto"):
        run(shop, tmp_path / "a", "train.epochs=1")
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


def test_resuming_another_model_names_the_key(shop: Path, tmp_path: Path) -> None:
    run(shop, tmp_path / "a", "train.epochs=1")
    with pytest.raises(ConfigError, match=r"model.num_blocks is 3.* with 2"):
        run(shop, tmp_path / "a", "model.num_blocks=3", resume="auto")


def test_holdout_tests_the_best_epoch(shop: Path, tmp_path: Path) -> None:
    result = run(shop, tmp_path / "a", "train.epochs=6", "train.lr=1e-2", "train.keep_checkpoints=1")
    valid = [(row["ndcg@10"], row["step"]) for row in lines(tmp_path / "a") if row["split"] == "valid"]
    best = max(value for value, _ in valid)
    assert result.checkpoint.name == f"step-{next(step for value, step in valid if value == best)}"
    assert result.metrics["valid"]["ndcg@10"] == best
    checked = evaluate(load_run_config(shop), result.checkpoint)
    assert checked.metrics == result.metrics


def test_meta_protocol_tests_the_last_epoch(shop: Path, tmp_path: Path) -> None:
    result = run(shop, tmp_path / "a", "eval.protocol=meta")
    assert set(result.metrics) == {"test"}
    assert result.checkpoint.name == "step-8"


def test_early_stop(shop: Path, tmp_path: Path) -> None:
    result = run(shop, tmp_path / "a", "train.epochs=50", "train.lr=0.2", "train.early_stop=2")
    valid = [row["ndcg@10"] for row in lines(tmp_path / "a") if row["split"] == "valid"]
    assert len(valid) < 50
    assert max(valid[-2:]) <= max(valid[:-2])
    again = run(shop, tmp_path / "a", "train.epochs=50", "train.lr=0.2", "train.early_stop=2", resume="auto")
    assert again.extra["steps"] == result.extra["steps"]


def test_accumulation_equals_the_larger_batch(shop: Path, tmp_path: Path) -> None:
    options = ("train.epochs=1", "model.dropout=0", "model.input_dropout=0", "train.max_steps=3")
    run(shop, tmp_path / "one", *options, "train.batch_size=16")
    run(shop, tmp_path / "two", *options, "train.batch_size=8", "train.accumulate=2")
    one, two = weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_token_budget_bounds_a_batch(shop: Path, tmp_path: Path) -> None:
    run(shop, tmp_path / "a", "train.epochs=1", "train.batch_tokens=100")
    tokens = [row["tokens"] for row in lines(tmp_path / "a") if "tokens" in row]
    assert max(tokens) <= 100
    assert len(tokens) > 4


def test_recompute_and_clipping_and_bf16_train(shop: Path, tmp_path: Path) -> None:
    plain = run(shop, tmp_path / "a", "train.epochs=1")
    run(shop, tmp_path / "b", "train.epochs=1", "train.recompute=true")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run(shop, tmp_path / "c", "train.epochs=1", "train.clip_norm=1e-3")
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    rounded = run(shop, tmp_path / "d", "train.epochs=1", "train.precision=bf16")
    loss = [next(r["epoch_loss"] for r in lines(tmp_path / x) if "epoch_loss" in r) for x in "ad"]
    assert loss[0] == pytest.approx(loss[1], rel=0.02)
    assert loss[0] != loss[1]
    assert rounded.metrics["test"].keys() == plain.metrics["test"].keys()


def test_profile_writes_a_trace(shop: Path, tmp_path: Path) -> None:
    run(shop, tmp_path / "a", "train.epochs=2", "train.profile=2")
    trace = json.loads((tmp_path / "a" / "profile" / "trace.json").read_text())
    assert any("npu_rec::hstu_attention" in str(event.get("name")) for event in trace["traceEvents"])


def test_init_from_loads_weights_alone(shop: Path, tmp_path: Path) -> None:
    first = run(shop, tmp_path / "a", "train.epochs=3", "train.lr=5e-3")
    run(shop, tmp_path / "b", "train.max_steps=1", "train.lr=1e-12", f"train.init_from={first.checkpoint}")
    trained, warm = open_checkpoint(first.checkpoint).tensors("model"), weights(tmp_path / "b")
    assert all(torch.allclose(trained[name], warm[name], atol=1e-9) for name in trained)
    with pytest.raises(CheckpointError, match=r"does not fit the model.*embedding_dim|is \[.*the model wants"):
        run(shop, tmp_path / "c", "model.embedding_dim=8", f"train.init_from={first.checkpoint}")
    with pytest.raises(CheckpointError, match=f"a part of a checkpoint, .* give its folder {first.checkpoint}$"):
        run(shop, tmp_path / "d", f"train.init_from={first.checkpoint / 'model-00001-of-00001.safetensors'}")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        run(shop, tmp_path / "d", f"train.init_from={tmp_path / 'nowhere'}")


def test_a_loss_that_is_not_finite_stops_or_skips(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Retrieval.loss, []

    def poisoned(self: Retrieval, prepared: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        losses, weight = original(self, prepared)
        return (losses * math.nan if len(calls) == 3 else losses), weight

    monkeypatch.setattr(Retrieval, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"step 3 .*loss nan.*Lower train\.lr, .*train\.nan: skip"):
        run(shop, tmp_path / "a", "train.checkpoint_every=1")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "a").values())
    calls[:] = [1, 1]  # the same step is as bad as before, and what the error advises may change
    advised = ("train.checkpoint_every=1", "train.nan=skip", "train.lr=1e-4")
    resumed = run(shop, tmp_path / "a", *advised, resume="auto")
    assert (resumed.resumed_from_step, resumed.extra["steps"]) == (2, 8)
    calls.clear()
    result = run(shop, tmp_path / "b", "train.nan=skip")
    assert result.extra["steps"] == 8
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "b").values())


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number of processes; start with torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a number of processes"),
    ],
)
def test_half_of_what_a_launcher_sets_is_refused(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], message: str
) -> None:
    set_by_launcher(monkeypatch, launcher)
    with pytest.raises(ConfigError, match=message):
        run(shop, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_world_of_one_needs_no_launcher(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_by_launcher(monkeypatch, {"WORLD_SIZE": "1"})
    result = run(shop, tmp_path / "a", "train.max_steps=1")
    assert result.is_first
    assert json.loads((tmp_path / "a" / "environment.json").read_text())["processes"] == 1


def set_by_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """These and no others."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_learning_rate_warms_up_and_follows_the_cosine() -> None:
    settings = load_run_config(
        "configs/base.yaml", ["train.warmup_steps=10", "train.schedule=cosine", "train.lr=1", "train.min_lr_ratio=0.1"]
    ).train
    rates = [learning_rate(settings, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
