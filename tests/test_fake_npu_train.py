"""Training, resuming, evaluation and serving on the fake npu, in strict mode, against the CPU."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_npu.harness import commands_on_npu, needs_fake_npu, npu_rec_on_npu, on_npu, start_npu_rec

from npu_rec.serving import Recommender, parse_history
from npu_rec.train import evaluate, load_run_config, train
from npu_rec.train.checkpoint import list_steps, open_checkpoint

pytestmark = needs_fake_npu

DATA = os.environ.get("NPU_REC_DATA")
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SAME_BACKENDS = [
    "ops.hstu_attention=tiled", "ops.sampled_softmax_loss=chunked", "ops.norm_gate=reference",
    "ops.embedding_lookup=reference",
]  # fmt: skip
OPTIONS = [*SAME_BACKENDS, "train.epochs=3", "train.checkpoint_every=1", "train.keep_checkpoints=50"]
HISTORY = "sku-1@10,sku-2@20,sku-4@30"


def settings(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def losses(run: Path) -> list[float]:
    """Of the optimiser steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "lr" in line]


def worst(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    step = list_steps(run / "checkpoints")[-1]
    return open_checkpoint(run / "checkpoints" / f"step-{step}").tensors("model")


@pytest.fixture(scope="module")
def runs(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `cpu`, and `half`, the same stopped after 5 of 12 steps."""
    folder = tmp_path_factory.mktemp("runs")
    train(load_run_config(shop, OPTIONS), run_dir=folder / "cpu")
    train(load_run_config(shop, [*OPTIONS, "train.max_steps=5"]), run_dir=folder / "half")
    return folder


@pytest.fixture(scope="module")
def npu(shop: Path, runs: Path) -> dict[str, Any]:
    """What the commands print on the npu; the run is `runs/npu`."""
    options = settings(*OPTIONS, "device.backend=ascend")
    cpu_checkpoint, npu_checkpoint = (runs / name / "checkpoints" / "step-12" for name in ("cpu", "npu"))
    return commands_on_npu(
        {
            "train": ["train", shop, *options, "--run-dir", runs / "npu"],
            "continue": ["train", shop, *options, "--run-dir", runs / "half", "--resume", "auto"],
            "evaluate": ["evaluate", shop, *options, "--checkpoint", cpu_checkpoint],
            "recommend": ["recommend", "--checkpoint", cpu_checkpoint, "--history", HISTORY, "--device", "ascend"],
            "recommend own": ["recommend", "--checkpoint", npu_checkpoint, "--history", HISTORY],
        },
        strict=True,
    )


def test_training_equals_the_cpu(npu: dict[str, Any], runs: Path) -> None:
    assert len(losses(runs / "npu")) == 12
    assert worst(losses(runs / "npu"), losses(runs / "cpu")) <= 1e-5
    saved = [open_checkpoint(runs / run / "checkpoints" / "step-12").tensors("random") for run in ("npu", "cpu")]
    assert [sorted(states) for states in saved] == [["device", "host"], ["host"]]  # one did run on the npu
    ours, theirs = final_weights(runs / "npu"), final_weights(runs / "cpu")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def test_a_run_of_the_cpu_continues_on_the_npu(npu: dict[str, Any], runs: Path) -> None:
    assert npu["continue"]["resumed_from_step"] == 5
    assert worst(losses(runs / "half"), losses(runs / "cpu")) <= 1e-5


def test_a_checkpoint_of_the_cpu_answers_on_the_npu(npu: dict[str, Any], runs: Path, shop: Path) -> None:
    checkpoint = runs / "cpu" / "checkpoints" / "step-12"
    assert npu["evaluate"]["metrics"] == evaluate(load_run_config(shop, OPTIONS), checkpoint).metrics
    same_answer(npu["recommend"], checkpoint)


def test_a_checkpoint_of_the_npu_answers_on_the_cpu(npu: dict[str, Any], runs: Path, shop: Path) -> None:
    checkpoint = runs / "npu" / "checkpoints" / "step-12"
    chosen = Path(npu["train"]["checkpoint"])
    assert evaluate(load_run_config(shop, OPTIONS), chosen).metrics["test"] == npu["train"]["metrics"]["test"]
    same_answer(npu["recommend own"], checkpoint)


def same_answer(answers: list[dict[str, Any]], checkpoint: Path) -> None:
    (expected,) = Recommender(checkpoint, "cpu").recommend([parse_history(HISTORY)], 10)
    (answer,) = answers
    assert [item["id"] for item in answer["items"]] == [item["id"] for item in expected.items]
    for item, on_cpu in zip(answer["items"], expected.items, strict=True):
        assert item["score"] == pytest.approx(on_cpu["score"], rel=1e-5)


def test_killed_and_resumed_is_bit_identical(npu: dict[str, Any], shop: Path, runs: Path) -> None:
    command = ["train", shop, *settings(*OPTIONS, "device.backend=ascend"), "--run-dir", runs / "killed"]
    with start_npu_rec(*command, strict=True) as process:
        deadline = time.monotonic() + 120
        while not (runs / "killed" / "checkpoints" / "step-2").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    resumed = npu_rec_on_npu(*command, "--resume", "auto", strict=True)
    assert 2 <= resumed["resumed_from_step"] < 12
    whole, parts = final_weights(runs / "npu"), final_weights(runs / "killed")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_variants_equal_the_cpu(shop: Path, tmp_path: Path) -> None:
    """Every backbone, tables that update themselves, every source of negatives, both losses, recomputation."""
    on_npu("train_variants.py", shop, tmp_path, strict=True)


def test_bf16(shop: Path, runs: Path, npu: dict[str, Any], tmp_path: Path) -> None:
    options = settings(*OPTIONS, "train.precision=bf16", "device.backend=ascend")
    npu_rec_on_npu("train", shop, *options, "--run-dir", tmp_path / "bf16", strict=True)
    train(load_run_config(shop, [*OPTIONS, "train.precision=bf16"]), run_dir=tmp_path / "cpu")
    exact = losses(runs / "npu")
    assert 1e-5 < worst(losses(tmp_path / "bf16"), exact) < 0.05  # 8 bits of mantissa
    assert worst(losses(tmp_path / "bf16"), losses(tmp_path / "cpu")) < 0.02


@pytest.mark.skipif(DATA is None, reason="NPU_REC_DATA is not set")
def test_quickstart_starts_like_the_cpu(tmp_path: Path) -> None:
    """The first 20 losses of configs/quickstart.yaml."""
    options = [*SAME_BACKENDS, *quickstart(tmp_path), "train.max_steps=20", "train.log_every=1", "eval.every=99"]
    npu_rec_on_npu(
        "train", QUICKSTART, *settings(*options, "device.backend=ascend"), "--run-dir", tmp_path / "npu", strict=True
    )
    train(load_run_config(QUICKSTART, [*options, "device.backend=cpu"]), run_dir=tmp_path / "cpu")
    assert len(losses(tmp_path / "npu")) == 20
    assert worst(losses(tmp_path / "npu"), losses(tmp_path / "cpu")) <= 1e-5


def quickstart(folder: Path) -> list[str]:
    return [f"data.source={Path(str(DATA)) / 'ml-100k'}", f"data.dir={folder / 'prepared'}", "device.threads=1"]


@pytest.mark.reproduce
@pytest.mark.timeout(3600)
@pytest.mark.skipif(DATA is None, reason="NPU_REC_DATA is not set")
def test_quickstart_ends_like_the_cpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The whole of configs/quickstart.yaml on the fake npu, strict, `auto` backends there as on the CPU.

    NPU_REC_DATA=... python -m pytest -m reproduce tests/test_fake_npu_train.py
    """
    if "reproduce" not in request.config.option.markexpr:
        pytest.skip("takes minutes; asked for by -m reproduce")
    options = quickstart(tmp_path)
    ascend = npu_rec_on_npu(
        "train", QUICKSTART, *settings(*options, "device.backend=ascend"), "--run-dir", tmp_path / "npu", strict=True
    )
    cpu = train(load_run_config(QUICKSTART, [*options, "device.backend=cpu"]), run_dir=tmp_path / "cpu")
    found, expected = ascend["metrics"]["test"]["hr@10"], cpu.metrics["test"]["hr@10"]
    print(f"HR@10: {found:.4f} on the fake npu, {expected:.4f} on the CPU")
    assert found == pytest.approx(expected, rel=0.1)
