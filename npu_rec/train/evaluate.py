"""Evaluation of a task on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np
import polars as pl
import torch

from npu_rec.config import Config
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.splits import Split
from npu_rec.device import Device
from npu_rec.errors import ConfigError
from npu_rec.tasks import Task, build_task
from npu_rec.train.checkpoint import load_weights, open_checkpoint
from npu_rec.train.setup import open_data, open_device

Result = TypeVar("Result")


def evaluate_split(task: Task, split: Split, config: Config, device: Device) -> dict[str, float]:
    """The metrics of `eval.metrics` on a split; the task is left in the mode it was in."""
    return _in_evaluation(
        task, config, device, lambda: task.evaluate(_batches(split, config, device), config.eval.metrics)
    )


def ranks_of_split(task: Task, split: Split, config: Config, device: Device) -> pl.DataFrame:
    """A row for each held-out event: `split`, `user` (raw id, text), `rank` from 1."""
    ranks = _in_evaluation(
        task, config, device, lambda: [task.ranks(batch).cpu() for batch in _batches(split, config, device)]
    )
    users = [str(user) for user in split.store.users(split.sequences)]
    return pl.DataFrame({"split": [split.name] * len(users), "user": users, "rank": torch.cat(ranks).numpy()})


def _batches(split: Split, config: Config, device: Device) -> Iterator[JaggedBatch]:
    for start in range(0, len(split), config.eval.batch_size):
        rows = np.arange(start, min(start + config.eval.batch_size, len(split)))
        yield split.batch(rows, config.eval.remove).to(device.torch_device)


@torch.no_grad()
def _in_evaluation(task: Task, config: Config, device: Device, compute: Callable[[], Result]) -> Result:
    was_training = task.training
    task.eval()
    try:
        with device.autocast(torch.bfloat16 if config.train.precision == "bf16" else None):
            return compute()
    finally:
        task.train(was_training)


@dataclass(frozen=True)
class EvaluateResult:
    """What `npu-rec evaluate` prints."""

    checkpoint: Path
    metrics: dict[str, dict[str, float]]
    seconds: float


def evaluate(config: Config, checkpoint_path: Path, *, ranks: Path | None = None) -> EvaluateResult:
    """Evaluate the weights of a checkpoint on every held-out split of the configured data.

    Args:
        ranks: a CSV file to write with the rank of every held-out item (`ranks_of_split`).

    Raises:
        ConfigError: `ranks` cannot be written, or the task ranks nothing.
    """
    if ranks is not None and not ranks.absolute().parent.is_dir():
        raise ConfigError(f"--ranks {ranks}: there is no folder {ranks.absolute().parent}")
    checkpoint = open_checkpoint(checkpoint_path)
    device = open_device(config)
    data = open_data(config)
    checkpoint.check_items(data.path / "items.arrow")
    task = build_task(config, data.facts)
    load_weights(task, checkpoint.tensors("model"), str(checkpoint_path))
    task.to(device.torch_device)
    start = perf_counter()
    held_out = {name: split for name, split in data.splits.items() if name != "train"}
    metrics = {name: evaluate_split(task, split, config, device) for name, split in held_out.items()}
    if ranks is not None:
        tables = [ranks_of_split(task, split, config, device) for split in held_out.values()]
        try:
            pl.concat(tables).write_csv(ranks)
        except OSError as error:
            raise ConfigError(f"--ranks {ranks}: cannot be written: {error}") from None
    return EvaluateResult(checkpoint_path, metrics, perf_counter() - start)
