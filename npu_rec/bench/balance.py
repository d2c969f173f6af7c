"""Steps of the ranks that share a global batch, in order and by cost; one process plays all ranks, in turn."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import mean

import torch
from torch import Tensor

from npu_rec.bench.harness import Contender, Row, compare
from npu_rec.config import Config, ModelConfig
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.loader import in_order
from npu_rec.device import Device
from npu_rec.distributed.balance import SequenceCost, imbalance
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, Task, build_task

RANKS, SEQUENCES, ITEMS = 8, 1024, 3_416


def run(device: Device, repeats: int) -> list[Row]:
    """Lengths spread as those of MovieLens-1M: the last 200 events of each history, and whole histories."""
    whole = torch.exp(torch.randn(SEQUENCES, dtype=torch.float64) * 1.05) * 96  # median 96 events
    histories = whole.to(torch.int64).clamp(18, 2300)
    return [
        row for longest in (200, 2300) for row in of_lengths(histories.clamp(max=longest), longest, device, repeats)
    ]


def of_lengths(lengths: Tensor, max_seq_len: int, device: Device, repeats: int) -> list[Row]:
    """Loss and gradients of research HSTU, 2 layers, for a global batch of sequences of `lengths [B]`.

    Returns:
        For each way to share two rows: the slowest rank, with the estimated imbalance in its shape, and the mean of
        all. A step of training takes as long as the former; speedups are against the slowest rank of sharing in order.
    """
    facts = DataFacts(ITEMS, range(1, ITEMS + 1), None, True)
    config = resolve(Config(model=ModelConfig(max_seq_len=max_seq_len)))
    task = build_task(config, facts).to(device.torch_device)
    cost = SequenceCost.from_flops(task.flops)
    sizes = lengths.numpy()
    shares = {"order": in_order(sizes, RANKS), "cost": cost.share(sizes, RANKS)}
    parameters = tuple(task.parameters())
    contenders = [
        Contender(policy, partial(_mean_loss, task, _batch(lengths[torch.from_numpy(own)], device)), parameters)
        for policy, by_rank in shares.items()
        for own in by_rank
    ]
    ranks = compare("balance", "", contenders, [()], device, repeats=repeats)
    rows: list[Row] = []
    for policy, by_rank in shares.items():
        estimate = imbalance([float(cost(sizes[own]).sum()) for own in by_rank])
        rows += _summary([row for row in ranks if row.backend == policy], estimate, f"B={len(lengths)} N={max_seq_len}")
    return [replace(row, speedup=rows[0].total_ms / row.total_ms) for row in rows]


def _summary(ranks: list[Row], estimate: float, shape: str) -> list[Row]:
    slowest = max(ranks, key=lambda row: row.total_ms)
    memory = slowest.peak_extra_bytes
    average = replace(
        slowest,
        forward_ms=mean(row.forward_ms for row in ranks),
        backward_ms=mean(row.backward_ms for row in ranks),
        peak_extra_bytes=None if memory is None else round(mean(row.peak_extra_bytes or 0 for row in ranks)),
        shape=f"{shape} mean of {len(ranks)} ranks",
    )
    measured = slowest.total_ms / average.total_ms
    text = f"{shape} slowest rank, {measured:.2f} of the mean, {estimate:.2f} estimated"
    return [replace(slowest, shape=text), average]


def _batch(lengths: Tensor, device: Device) -> JaggedBatch:
    total = int(lengths.sum())
    times = torch.randint(10**8, (total,)).sort().values
    ids = torch.randint(1, ITEMS + 1, (2, total))
    offsets = lengths_to_offsets(lengths)
    return JaggedBatch(torch.arange(len(lengths)), offsets, ids[0], ids[1], times, times + 60).to(device.torch_device)


def _mean_loss(task: Task, batch: JaggedBatch, *parameters: Tensor) -> Tensor:
    losses, weights = task.loss(task.prepare(batch, 0))
    return losses / weights
