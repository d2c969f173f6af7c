"""Ranking: which epoch is the best, what is not defined, predictions of a checkpoint, actions without end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import polars as pl
import pytest
from test_tasks_ranking import films  # noqa: F401  (a fixture)

from npu_rec.errors import ConfigError
from npu_rec.evaluation.predictions import prediction_metric
from npu_rec.train import evaluate, load_run_config, train

TWO_TARGETS = (
    "task.options.targets=[{name: stars, kind: regression, scale: 0.5}, {name: like, at_least: 2}]",
    "eval.metrics=[auc, mse, logloss]",
)


def valid_lines(folder: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl, which must be JSON without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "valid"]


@pytest.mark.parametrize(("select", "best"), [("mse", min), ("like/logloss", min), ("like/auc", max)])
def test_the_best_epoch_by_any_metric(films: Path, tmp_path: Path, select: str, best: object) -> None:  # noqa: F811
    config = load_run_config(films, [*TWO_TARGETS, f"eval.select={select}", "train.lr=0.05", "train.epochs=5"])
    result = train(config, run_dir=tmp_path / "run")
    lines = valid_lines(tmp_path / "run")
    assert set(result.metrics["valid"]) == {"mse", "like/auc", "like/logloss"}
    assert result.metrics["valid"][select] == best(line[select] for line in lines)  # type: ignore[operator]
    assert len({line[select] for line in lines}) == 5


@pytest.mark.parametrize("select", ["auc", "like/mse", "likes/auc", "like/ne"])
def test_a_metric_that_is_not_measured_selects_nothing(films: Path, select: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"eval\.select: .* is not among"):
        load_run_config(films, [*TWO_TARGETS, f"eval.select={select}"])


def test_what_is_not_a_number_is_never_the_best(
    films: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No action meets the target, so that there is no AUC; the first epoch stays, and three without gain end it."""
    settings = ["task.options.targets=[{name: like, at_least: 100}]", "train.epochs=8", "train.early_stop=3"]
    with caplog.at_level(logging.WARNING, "npu_rec"):
        result = train(load_run_config(films, settings), run_dir=tmp_path / "run")
    lines = valid_lines(tmp_path / "run")
    assert [line["auc"] for line in lines] == [None] * 4
    assert str(result.metrics["test"]["auc"]) == "nan"
    assert result.checkpoint.name == f"step-{lines[0]['step']:.0f}"
    assert "valid auc is not a number" in caplog.text


def test_predictions_give_the_metrics(films: Path, tmp_path: Path) -> None:  # noqa: F811
    config = load_run_config(films, [*TWO_TARGETS, "eval.select=mse", "train.epochs=1"])
    result = train(config, run_dir=tmp_path / "run")
    written = tmp_path / "predictions.csv"
    metrics = evaluate(config, result.checkpoint, predictions=written).metrics
    table = pl.read_csv(written)
    assert table.columns == ["split", "user", "item", "stars/score", "stars/label", "like/score", "like/label"]
    assert table["user"].is_between(0, 159).all()
    assert table["item"].is_between(0, 29).all()
    for split in ("valid", "test"):
        rows = table.filter(pl.col("split") == split)
        score, label, users = (rows[name].to_torch() for name in ("like/score", "like/label", "user"))
        assert metrics[split]["like/auc"] == pytest.approx(prediction_metric("auc", score, label, users))
        error = (rows["stars/score"] - rows["stars/label"]).pow(2).mean()
        assert metrics[split]["mse"] == pytest.approx(error)
        assert set(rows["stars/label"]) == {0.5, 1.0}
    with pytest.raises(ConfigError, match=r"--ranks: task\.name ranking has nothing to write there; it has --predict"):
        evaluate(config, result.checkpoint, ranks=written)
    with pytest.raises(ConfigError, match="there is no folder"):
        evaluate(config, result.checkpoint, predictions=tmp_path / "no" / "predictions.csv")


def test_another_model_than_was_trained_is_mentioned(
    films: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = train(load_run_config(films, ["train.max_steps=1"]), run_dir=tmp_path / "run")
    with caplog.at_level(logging.WARNING, "npu_rec"):
        evaluate(load_run_config(films, ["model.dropout=0.3", "eval.batch_size=7"]), result.checkpoint)
        assert not caplog.records
        evaluate(load_run_config(films, ["model.options.scores=softmax"]), result.checkpoint)
    assert "model.options.scores is 'softmax', the checkpoint" in caplog.text
    assert "was trained with 'silu'" in caplog.text


def test_actions_without_end_are_refused(tmp_path: Path, films: Path) -> None:  # noqa: F811
    lines = [f"{user},{k},{3_000_000_000 + k},{k}" for user in range(9) for k in range(9)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,action,timestamp", *lines]) + "\n")
    there = [
        f"data.source={tmp_path}", f"data.dir={tmp_path / 'prepared'}", "data.options.items_file=null",
        "data.options.users_file=null", "train.epochs=1", "eval.test_share=0.3", "eval.valid_share=0.3",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"actions go up to 3,000,000,008: bits has one for each bit, or put them in"):
        train(load_run_config(films, there), run_dir=tmp_path / "a")
    train(load_run_config(films, [*there, "task.options.actions=bits"]), run_dir=tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("task.options.head=dot", "task.options.head_hidden=[3]"),
            "head_hidden has no effect: head dot",
        ),
        (("task.options.candidates=3",), "candidates has no effect: layout interleaved"),
        (
            ("task.options.targets=[{name: a, kind: regression}]", "task.options.negative_ratio=0.5"),
            "negative_ratio has no effect: it is for binary targets",
        ),
        (("task.options.item_pooling=project",), "item_pooling has no effect: there are no item_features"),
        (("task.options.user_features=[taste, taste]",), "user_features: taste is given twice"),
        (("parallel.context=2",), "cannot share sequences"),
    ],
)
def test_what_would_do_nothing_is_refused(
    films: Path,  # noqa: F811
    tmp_path: Path,
    settings: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_run_config(films, list(settings)), run_dir=tmp_path / "run")
