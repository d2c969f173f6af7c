"""A step of training without the optimiser."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from npu_rec.bench.harness import COPIES, Contender, Row, compare
from npu_rec.config import Config, OpsConfig
from npu_rec.data.batch import JaggedBatch
from npu_rec.device import Device
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, Task, build_task


def run(device: Device, repeats: int) -> list[Row]:
    """Loss and gradients of research HSTU as on MovieLens-1M: 2 layers, 128 sequences of up to 200 events."""
    count, at = 3_416, device.torch_device
    facts = DataFacts(count, range(1, count + 1), None, True)
    tasks = []
    for backend in ("reference", "auto"):
        ops = OpsConfig(**dict.fromkeys(OpsConfig.model_fields, backend))
        tasks.append(build_task(resolve(Config(ops=ops)), facts).to(at))
    lengths = torch.cat([torch.arange(20, 200, 3), torch.full((68,), 200)])
    offsets, total = lengths_to_offsets(lengths), int(lengths.sum())

    def batch() -> JaggedBatch:
        times = torch.randint(10**8, (total,)).sort().values
        ids = torch.randint(1, count + 1, (2, total))
        return JaggedBatch(torch.arange(len(lengths)), offsets, ids[0], ids[1], times, times + 60).to(at)

    def mean_loss(task: Task, batch: JaggedBatch, *parameters: Tensor) -> Tensor:
        losses, weights = task.loss(task.prepare(batch, 0))
        return losses / weights

    # the parameters stand among the inputs because the gradients of inputs are what is timed
    batches = [batch() for _ in range(COPIES)]
    contenders = [
        Contender(name, partial(mean_loss, task), tuple(task.parameters()))
        for name, task in zip(("references", "auto"), tasks, strict=True)
    ]
    shape = f"2 layers B={len(lengths)} T={total} D=50"
    flops = tasks[1].flops(lengths)
    copies = [(batch,) for batch in batches]
    return compare("train-step", shape, contenders, copies, device, repeats=repeats, flops=(flops, 2.0 * flops))
