"""Evaluation of a task on a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from npu_rec.config import Config
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.splits import Split
from npu_rec.device import Device
from npu_rec.tasks import Task, build_task
from npu_rec.train.checkpoint import load_weights, open_checkpoint
from npu_rec.train.setup import open_data, open_device


@torch.no_grad()
def evaluate_split(task: Task, split: Split, config: Config, device: Device) -> dict[str, float]:
    """The metrics of `eval.metrics` on a split; the task is left in the mode it was in."""

    def batches() -> Iterator[JaggedBatch]:
        for start in range(0, len(split), config.eval.batch_size):
            rows = np.arange(start, min(start + config.eval.batch_size, len(split)))
            yield split.batch(rows, config.eval.remove).to(device.torch_device)

    was_training = task.training
    task.eval()
    try:
        with device.autocast(torch.bfloat16 if config.train.precision == "bf16" else None):
            return task.evaluate(batches(), config.eval.metrics)
    finally:
        task.train(was_training)


@dataclass(frozen=True)
class EvaluateResult:
    """What `npu-rec evaluate` prints."""

    checkpoint: Path
    metrics: dict[str, dict[str, float]]
    seconds: float


def evaluate(config: Config, checkpoint_path: Path) -> EvaluateResult:
    """Evaluate the weights of a checkpoint on every held-out split of the configured data."""
    checkpoint = open_checkpoint(checkpoint_path)
    device = open_device(config)
    data = open_data(config)
    checkpoint.check_items(data.path / "items.arrow")
    task = build_task(config, data.facts)
    load_weights(task, checkpoint.tensors("model"), str(checkpoint_path))
    task.to(device.torch_device)
    start = perf_counter()
    metrics = {
        name: evaluate_split(task, split, config, device) for name, split in data.splits.items() if name != "train"
    }
    return EvaluateResult(checkpoint_path, metrics, perf_counter() - start)
