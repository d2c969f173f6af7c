"""One point of a study, in a process of its own: train, measure, leave `result.json` in the run directory.

`python -c "from npu_rec.scaling.point import main; main()" <run directory>` reads what `write_order` left there.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npu_rec.config import Config, dump_config, load_resolved
from npu_rec.data.loader import TrainLoader
from npu_rec.data.splits import Split
from npu_rec.data.stochastic_length import make_stochastic_length
from npu_rec.device import Device
from npu_rec.errors import TrainingError, UserError
from npu_rec.registry import resolve
from npu_rec.scaling.entropy import mean_entropy
from npu_rec.scaling.study import Point
from npu_rec.tasks import Task, build_task
from npu_rec.train import train
from npu_rec.train.checkpoint import open_checkpoint
from npu_rec.train.optim import table_weights
from npu_rec.train.run_dir import RunDirectory, without_nan
from npu_rec.train.setup import RunData, open_data, open_device
from npu_rec.train.state import load_weights

ORDER, RESULT = "point.json", "result.json"


@dataclass(frozen=True)
class Measured:
    """What a trained point is, counted from the model and the data.

    Attributes:
        parameters: outside the embedding tables; table_parameters: in them.
        flops_per_token: of a forward pass with loss, mean over the tokens that are read.
        tokens: events that the model reads in an epoch: the size of the training data.
        tokens_seen: over all epochs trained, of each sequence as much as Stochastic Length has left.
        flops: of the training, a backward pass counted as two forward passes.
        entropy: Approximate Entropy of the training sequences, or None where none is long enough.
    """

    backbone: str
    blocks: int
    width: int
    parameters: int
    table_parameters: int
    flops_per_token: float
    sequences: int
    tokens: int
    tokens_seen: int
    flops: float
    epochs: int
    best_epoch: int
    steps: int
    entropy: float | None


def write_order(folder: Path, point: Point, entropy: dict[str, Any]) -> None:
    """What the process of a point needs to know."""
    folder.mkdir(parents=True, exist_ok=True)
    order = {
        "point": point.name,
        "fingerprint": point.fingerprint,
        "settings": point.settings,
        "entropy": entropy,
        "config": dump_config(point.config),
    }
    _write(folder / ORDER, order)


def run_point(folder: Path) -> dict[str, Any]:
    """Train a point, from its newest checkpoint if there is one, and measure it; returns the row of results."""
    order = json.loads((folder / ORDER).read_text())
    resolved = folder / "order.yaml"
    resolved.write_text(order["config"])
    config = resolve(load_resolved(resolved))
    resolved.unlink()
    result = train(config, run_dir=folder, resume="auto")
    metrics: dict[str, dict[str, float]] = {split: dict(values) for split, values in result.metrics.items()}
    device, data = open_device(config), open_data(config)
    task = build_task(config, data.facts)
    task.to(device.torch_device)
    load_weights(task, open_checkpoint(result.checkpoint), str(result.checkpoint))
    lines = RunDirectory(folder).metrics()
    for name, values in metrics.items():
        loss = held_out_loss(task, data.splits[name], config, device)
        if loss is not None:
            values["loss"] = loss
    losses = [line["epoch_loss"] for line in lines if "epoch_loss" in line]
    metrics["train"] = {"loss": losses[-1]}
    row = {
        "point": order["point"],
        "fingerprint": order["fingerprint"],
        "status": "finished",
        "settings": order["settings"],
        **asdict(_measure(task, data, config, result.extra["steps"], lines, order["entropy"])),
        "entropy_settings": order["entropy"],
        "metrics": metrics,
        "seconds": round(result.extra["train_seconds"], 3),
        "threads": torch.get_num_threads(),
    }
    _write(folder / RESULT, row)
    return row


@torch.no_grad()
def held_out_loss(task: Task, split: Split, config: Config, device: Device) -> float | None:
    """Mean cross-entropy of the held-out item against the whole catalogue, in nats; None where the task has none.

    Nothing is sampled and nothing taken out of the ranking, so losses of different points can be compared.
    """
    if type(task).log_likelihood is Task.log_likelihood:
        return None
    task.eval()
    losses = []
    for start in range(0, len(split), config.eval.batch_size):
        rows = np.arange(start, min(start + config.eval.batch_size, len(split)))
        batch = split.batch(rows, "none").to(device.torch_device)
        losses.append(-task.log_likelihood(batch).cpu().double())
    return float(torch.cat(losses).mean())


def _measure(
    task: Task, data: RunData, config: Config, steps: int, lines: list[dict[str, Any]], entropy: dict[str, Any]
) -> Measured:
    split, rows = data.splits["train"], table_weights(task)
    tokens = int(split.lengths.sum())
    lengths = _lengths_read(data, config, steps)
    seen = int(lengths.sum())
    # without Stochastic Length an epoch is as any other
    each = split.lengths if config.train.stochastic_length is None else lengths
    flops = task.flops(torch.from_numpy(each)) / int(each.sum())
    tested = next(line["step"] for line in reversed(lines) if line["split"] == "test")
    epoch_ends = {line["step"]: line["epoch"] for line in lines if "epoch_loss" in line}
    apen = mean_entropy(split, **entropy)
    return Measured(
        backbone=config.model.backbone,
        blocks=config.model.num_blocks,
        width=config.model.embedding_dim,
        parameters=sum(p.numel() for p in task.parameters() if p not in rows),
        table_parameters=sum((table.spec.num_rows or 0) * table.spec.dim for table in task.tables.tables.values()),
        flops_per_token=flops,
        sequences=len(split),
        tokens=tokens,
        tokens_seen=seen,
        flops=3.0 * flops * seen,
        epochs=max(epoch_ends.values()),
        best_epoch=epoch_ends[tested],
        steps=steps,
        entropy=None if math.isnan(apen) else apen,
    )


def _lengths_read(data: RunData, config: Config, steps: int) -> np.ndarray:
    """Of every sequence of every epoch, in so many steps, the tokens that the model reads."""
    train = config.train
    loader = TrainLoader(
        data.splits["train"],
        batch_size=train.batch_size,
        batch_tokens=train.batch_tokens,
        seed=train.seed,
        stochastic_length=make_stochastic_length(
            train.stochastic_length,
            train.stochastic_selection,
            max_seq_len=config.model.max_seq_len,
            seed=train.seed,
            has_times=data.facts.has_times,
        ),
    )
    read, left = [], steps
    for epoch in range(train.epochs):
        done = loader.batches(epoch)[: left * train.accumulate]
        read += [loader.lengths(epoch)[rows] for rows in done]
        left -= -(-len(done) // train.accumulate)
    return np.concatenate(read)


def _write(path: Path, document: dict[str, Any]) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(without_nan(document)))
    os.replace(beside, path)


def main() -> None:
    """The process of one point."""
    try:
        run_point(Path(sys.argv[1]))
    except (UserError, TrainingError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(1) from None
