"""Two ranks under torchrun, one of them killed in the middle of training: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from npu_rec.train.checkpoint import list_steps, open_checkpoint

STEPS = 12  # 60 users, batches of 16, 3 epochs
KILLED_IN = 7

# Dropout and sampled negatives are on (the defaults): both are draws that a restart could get wrong.
OPTIONS = [
    "imports=[fragile]",
    "task.name=fragile",
    "task.options={num_negatives: 8}",
    "train.epochs=3",
    "train.checkpoint_every=2",
    "parallel.timeout=60",
]

FRAGILE = """
import os
import signal

from npu_rec.registry import register
from npu_rec.tasks import Retrieval
from npu_rec.tasks.retrieval import RetrievalOptions


@register("task", "fragile", options=RetrievalOptions)
class Fragile(Retrieval):
    steps = 0

    def loss(self, prepared):
        self.steps += 1
        fatal = self.steps == int(os.environ["KILLED_IN"]) and os.environ["RANK"] == "1"
        if fatal and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(prepared)
"""


def torchrun(shop: Path, folder: Path, *options: str, killed_in: int) -> tuple[int, str]:
    """Train on two ranks; exit code and standard error. When it takes too long, the launcher is told to end them."""
    (folder / "fragile.py").write_text(FRAGILE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "2", "--monitor-interval", "0.2", "-m", "npu_rec", "train", str(shop)]
    for option in (*OPTIONS, *options):
        command += ["--set", option]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "KILLED_IN": str(killed_in), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [*command, "--resume", "auto", "--run-dir", str(folder / "run")],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        error = process.communicate(timeout=240)[1]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    return process.returncode, error


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def without_speed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("tokens_per_second", "mfu")}


@pytest.mark.parametrize("embedding", [(), ("embedding.optimizer=rowwise_adagrad", "embedding.kind=dynamic")])
def test_a_killed_rank_changes_nothing(shop: Path, tmp_path: Path, embedding: tuple[str, ...]) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder, killed_in in ((undisturbed, 0), (disturbed, KILLED_IN)):
        folder.mkdir()
        code, error = torchrun(shop, folder, *embedding, killed_in=killed_in)
        assert code == 0, error
        assert ("failed (exitcode: -9) local_rank: 1" in error) == (killed_in > 0), error
        assert ("resumed from step" in error) == (killed_in > 0), error

    steps = [line["step"] for line in lines(disturbed) if "lr" in line]
    assert steps == list(range(1, STEPS + 1))  # no batch twice, none lost
    assert [without_speed(line) for line in lines(disturbed)] == [without_speed(line) for line in lines(undisturbed)]

    folders = [folder / "run" / "checkpoints" for folder in (undisturbed, disturbed)]
    assert list_steps(folders[0]) == list_steps(folders[1])
    whole, parts = (open_checkpoint(folder / f"step-{STEPS}") for folder in folders)
    for prefix in ("model", "optimizer"):
        expected, found = whole.tensors(prefix), parts.tensors(prefix)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.keyed_names == parts.keyed_names
    for name in whole.keyed_names:
        for one, other in zip(whole.keyed(name), parts.keyed(name), strict=True):
            assert torch.equal(one.keys, other.keys)
            assert all(torch.equal(one.columns[part], other.columns[part]) for part in one.columns)
