"""Training with Stochastic Length: resumed, on two ranks, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_ranks import Job, column, logged, run_jobs, train_on_ranks, worst

from npu_rec.errors import ConfigError
from npu_rec.train import evaluate, load_run_config, train
from npu_rec.train.checkpoint import open_checkpoint

RULE = "train.stochastic_length=1.2"  # of more than five of 16 events, five
CASES = {
    "weighted": (RULE,),
    "random, token budget": (RULE, "train.stochastic_selection=random", "train.batch_tokens=60"),
    "context": (RULE, "parallel.context=2"),
    "recent, rowwise_adagrad": (RULE, "train.stochastic_selection=recent", "embedding.optimizer=rowwise_adagrad"),
}


def test_two_ranks_train_what_one_does(shop: Path, tmp_path: Path) -> None:
    jobs = {
        ranks: [
            Job(str(shop), str(tmp_path / str(ranks) / name), ("train.epochs=3", "eval.every=99", *options))
            for name, options in CASES.items()
        ]
        for ranks in (1, 2)
    }
    run_jobs(jobs[1])
    train_on_ranks(2, jobs[2])
    for name in CASES:
        found, expected = tmp_path / "2" / name, tmp_path / "1" / name
        assert column(found, "tokens") == column(expected, "tokens")
        assert worst(column(found, "loss"), column(expected, "loss")) <= 1e-4
        assert worst(column(found, "gradient_norm"), column(expected, "gradient_norm")) <= 1e-4
        for key in ("hr@10", "mrr"):
            assert abs(logged(found, "test")[-1][key] - logged(expected, "test")[-1][key]) <= 1 / 60
    assert max(column(tmp_path / "1" / "random, token budget", "tokens")) <= 60


def test_stopped_and_resumed_equals_undisturbed(shop: Path, tmp_path: Path) -> None:
    options = [RULE, "eval.protocol=meta", "train.epochs=3", "train.checkpoint_every=1"]
    whole = train(load_run_config(shop, options), run_dir=tmp_path / "whole")
    train(load_run_config(shop, [*options, "train.max_steps=6"]), run_dir=tmp_path / "parts")
    rest = train(load_run_config(shop, options), run_dir=tmp_path / "parts", resume="auto")
    assert rest.resumed_from_step == 6
    ours, theirs = (
        open_checkpoint(tmp_path / name / "checkpoints" / "step-12").tensors("model") for name in ("whole", "parts")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rest.metrics == whole.metrics
    with pytest.raises(ConfigError, match=r"train\.stochastic_length is 1\.4, the run .* with 1\.2"):
        train(
            load_run_config(shop, [*options, "train.stochastic_length=1.4"]), run_dir=tmp_path / "parts", resume="auto"
        )


def test_fewer_tokens_are_trained_on_and_evaluation_sees_all(shop: Path, tmp_path: Path) -> None:
    tokens = {}
    for name, options in {"all": [], "off": ["train.stochastic_length=2"], "part": [RULE]}.items():
        result = train(load_run_config(shop, ["train.epochs=1", *options]), run_dir=tmp_path / name)
        tokens[name] = column(tmp_path / name, "tokens")
        assert evaluate(load_run_config(shop), result.checkpoint).metrics == result.metrics
    assert tokens["off"] == tokens["all"]
    assert column(tmp_path / "off", "loss") == column(tmp_path / "all", "loss")
    assert sum(tokens["part"]) < 0.9 * sum(tokens["all"])
    assert len(tokens["part"]) == len(tokens["all"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.stochastic_length=1", "greater than 1"),
        ("train.stochastic_length=2.5", "less than or equal to 2"),
        ("train.stochastic_length=.nan", "train.stochastic_length"),
        ("train.stochastic_selection=oldest", "train.stochastic_selection"),
    ],
)
def test_a_wrong_setting_is_one_line(shop: Path, option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_run_config(shop, [option])
    assert "\n" not in str(caught.value)


def test_data_without_times_cannot_be_chosen_from_by_age(shop: Path, tmp_path: Path) -> None:
    options = ["data.options.timestamp=null", "model.options.bias=position", "train.max_steps=1", RULE]
    with pytest.raises(ConfigError, match="data has no times; set it to random or recent") as caught:
        train(load_run_config(shop, options), run_dir=tmp_path / "a")
    assert "\n" not in str(caught.value)
    options.append("train.stochastic_selection=random")
    train(load_run_config(shop, options), run_dir=tmp_path / "b")
