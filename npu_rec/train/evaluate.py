"""Evaluation of a task on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from npu_rec.config import Config
from npu_rec.data.batch import Batch
from npu_rec.data.splits import Split
from npu_rec.device import Device
from npu_rec.distributed import open_world
from npu_rec.errors import ConfigError
from npu_rec.registry import lookup
from npu_rec.tasks import Task, build_task
from npu_rec.train.checkpoint import open_checkpoint
from npu_rec.train.position import warn_of_another_model
from npu_rec.train.setup import open_data, open_device
from npu_rec.train.state import load_weights

Result = TypeVar("Result")


def evaluate_split(task: Task, split: Split, config: Config, device: Device) -> dict[str, float]:
    """The metrics of `eval.metrics` on a split, over all ranks; the task is left in the mode it was in."""
    observed = _in_evaluation(task, config, device, lambda: _all_sequences(task, split, config, device, task.observe))
    return task.metrics(observed, config.eval.metrics)


def ranks_of_split(task: Task, split: Split, config: Config, device: Device) -> pl.DataFrame:
    """A row for each held-out event: `split`, `user` (raw id, text), `rank` from 1."""
    ranks = _in_evaluation(task, config, device, lambda: _all_sequences(task, split, config, device, task.ranks))
    users = [str(user) for user in split.store.users(split.sequences)]
    return pl.DataFrame({"split": [split.name] * len(users), "user": users, "rank": ranks.numpy()})


def predictions_of_split(task: Task, split: Split, config: Config, device: Device) -> pl.DataFrame:
    """A row for each judged event: `split`, `user` and `item` (raw ids, text), the task's scores and labels."""
    observed = _in_evaluation(task, config, device, lambda: _all_sequences(task, split, config, device, task.observe))
    users = [str(user) for user in split.store.users(split.sequences)]
    columns = {name: column.numpy() for name, column in task.predictions(observed).items()}
    raw_ids = dict(zip(*(split.store.items[name].to_pylist() for name in ("item_id", "raw_id")), strict=True))
    items = [str(raw_ids[item]) for item in columns.pop("item_id").tolist()]
    return pl.DataFrame({"split": [split.name] * len(users), "user": users, "item": items, **columns})


def _all_sequences(
    task: Task, split: Split, config: Config, device: Device, observe: Callable[[Batch], Tensor]
) -> Tensor:
    """`observe` of every sequence of a split, in its order, on the host; each rank works on its part."""
    world, size = task.world, config.eval.batch_size
    own = np.arange(world.rank, len(split), world.size)
    batches = -(-len(split) // (size * world.size))  # the same on all ranks: lookups and scores are collective
    parts = []
    for batch in range(batches):
        rows = own[batch * size : (batch + 1) * size]
        # on the host first: metrics are float64, which not every card has
        parts.append(observe(split.batch(rows, config.eval.remove).to(device.torch_device)).cpu())
    everything = world.all_gather_rows(torch.cat(parts), "metrics of every sequence")
    order = torch.cat([torch.arange(rank, len(split), world.size) for rank in range(world.size)])
    observed = torch.empty_like(torch.cat(everything))
    observed[order] = torch.cat(everything)
    return observed


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
    """What `npu-rec evaluate` prints, on the first rank."""

    checkpoint: Path
    metrics: dict[str, dict[str, float]]
    seconds: float
    is_first: bool = True


def evaluate(
    config: Config, checkpoint_path: Path, *, ranks: Path | None = None, predictions: Path | None = None
) -> EvaluateResult:
    """Evaluate the weights of a checkpoint on every held-out split of the configured data.

    Under torchrun the processes share the sequences, and the tables as `embedding:` says.

    Args:
        ranks: a CSV file to write with the rank of every held-out item (`ranks_of_split`).
        predictions: a CSV file to write with the scores and labels of every judged event (`predictions_of_split`).

    Raises:
        ConfigError: a file cannot be written, or the task does not have what it should hold.
    """
    kind = lookup("task", config.task.name).target
    files = {
        "--ranks": (ranks, kind.ranks is not Task.ranks, ranks_of_split),
        "--predictions": (predictions, kind.predictions is not Task.predictions, predictions_of_split),
    }
    for option, (path, possible, _) in files.items():
        if path is not None and not possible:
            others = [other for other, (_, has, _) in files.items() if has]
            instead = f"; it has {' and '.join(others)}" if others else ""
            raise ConfigError(f"{option}: task.name {config.task.name} has nothing to write there{instead}")
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}")
    device = open_device(config)
    with open_world(device, timeout=config.parallel.timeout) as world:
        checkpoint = open_checkpoint(checkpoint_path, world)
        if world.is_first:
            warn_of_another_model(config, checkpoint)
        data = open_data(config)
        checkpoint.check_items(data.path / "items.arrow")
        task = build_task(config, data.facts, world)
        task.to(device.torch_device)
        load_weights(task, checkpoint, str(checkpoint_path))
        start = perf_counter()
        held_out = {name: split for name, split in data.splits.items() if name != "train"}
        metrics = {name: evaluate_split(task, split, config, device) for name, split in held_out.items()}
        for option, (path, _, rows) in files.items():
            if path is not None:
                tables = [rows(task, split, config, device) for split in held_out.values()]
                if world.is_first:
                    _write(pl.concat(tables), option, path)
        return EvaluateResult(checkpoint_path, metrics, perf_counter() - start, world.is_first)


def _write(table: pl.DataFrame, option: str, path: Path) -> None:
    try:
        table.write_csv(path)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error}") from None
