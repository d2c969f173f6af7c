"""Shared fixtures: a small data set with structure, and the command line."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # set before torch: spinning threads starve each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores

import torch

if torch.accelerator.current_accelerator(check_available=True) is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_commands
from hypothesis import settings

settings.register_profile("npu-rec", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("npu-rec")

REPOSITORY = Path(__file__).resolve().parent.parent


def write_shop(folder: Path, users: int = 60, items: int = 40, seed: int = 0) -> Path:
    """`events.csv` and `items.csv` of a made-up shop: users walk through neighbouring items."""
    rng = np.random.default_rng(seed)
    lines = ["user,item,timestamp"]
    for user in range(users):
        time, item = 1_600_000_000 + user, int(rng.integers(items))
        for _ in range(int(rng.integers(4, 25))):
            lines.append(f"u{user},sku-{item},{time}")
            time += int(rng.integers(1, 10**6))
            item = (item + int(rng.integers(1, 4))) % items
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    titles = [f'sku-{i},"Thing, number {i}"' for i in range(items)]
    (folder / "items.csv").write_text("\n".join(["item,title", *titles]) + "\n")
    return folder


SHOP = """
name: shop
data:
  name: interactions
  source: {source}
  dir: {prepared}
  options: {{file: events.csv, items_file: items.csv}}
model: {{embedding_dim: 16, num_blocks: 2, num_heads: 2, attention_dim: 8, linear_dim: 8, max_seq_len: 16}}
task: {{name: retrieval, options: {{num_negatives: 8}}}}
train: {{epochs: 2, batch_size: 16, log_every: 1}}
eval: {{protocol: holdout, metrics: [hr@1, hr@10, ndcg@10, mrr], select: ndcg@10}}
device: {{backend: cpu, threads: 1}}
"""


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file for the shop; its data is prepared once a session."""
    folder = tmp_path_factory.mktemp("shop")
    config = folder / "shop.yaml"
    config.write_text(SHOP.format(source=write_shop(folder / "source"), prepared=folder / "prepared"))
    return config


@pytest.fixture
def real() -> Path:
    """The folder of real data sets, which are not part of the project."""
    if "NPU_REC_DATA" not in os.environ:
        pytest.skip("NPU_REC_DATA is not set: no real data to read")
    return Path(os.environ["NPU_REC_DATA"])


@pytest.fixture
def no_process_group() -> None:
    """End the group of one process that the engine torchrec may have made here: simulated ranks make their own."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def npu_rec(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `npu-rec ...` in a process of its own; with `env` one that starts with these variables."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables = {**inherited, "OMP_NUM_THREADS": "1"}
    given = [str(argument) for argument in arguments]
    if env is None:
        return warm_commands.run(given, cwd or Path.cwd(), variables)
    return subprocess.run(
        [sys.executable, "-m", "npu_rec", *given],
        cwd=cwd,
        env=variables | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def npu_rec_json(*arguments: object, **kwargs: Any) -> Any:
    """Run a command with --json; the document it prints."""
    done = npu_rec(*arguments, "--json", **kwargs)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
