"""A step of training without the optimiser."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from npu_rec.bench.harness import COPIES, Contender, Row, compare
from npu_rec.config import Config, ModelConfig, OpsConfig
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.splits import windows_batch
from npu_rec.data.stochastic_length import StochasticLength
from npu_rec.device import Device
from npu_rec.distributed.balance import SequenceCost
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, Task, build_task

ITEMS = 3_416
LONG, SEQUENCES, EPOCHS = 4096, 16, 64  # of the case with Stochastic Length


def run(device: Device, repeats: int) -> list[Row]:
    """Research HSTU with two layers: as on MovieLens-1M, and with long sequences read whole or by Stochastic Length."""
    return short_sequences(device, repeats) + long_sequences(device, repeats)


def short_sequences(device: Device, repeats: int) -> list[Row]:
    """Loss and gradients of 128 sequences of up to 200 events, by the reference operators and the automatic ones."""
    at = device.torch_device
    facts = DataFacts(ITEMS, range(1, ITEMS + 1), None, True)
    tasks = []
    for backend in ("reference", "auto"):
        ops = OpsConfig(**dict.fromkeys(OpsConfig.model_fields, backend))
        tasks.append(build_task(resolve(Config(ops=ops)), facts).to(at))
    lengths = torch.cat([torch.arange(20, 200, 3), torch.full((68,), 200)])
    offsets, total = lengths_to_offsets(lengths), int(lengths.sum())

    def batch() -> JaggedBatch:
        times = torch.randint(10**8, (total,)).sort().values
        ids = torch.randint(1, ITEMS + 1, (2, total))
        return JaggedBatch(torch.arange(len(lengths)), offsets, ids[0], ids[1], times, times + 60).to(at)

    # the parameters stand among the inputs because the gradients of inputs are what is timed
    batches = [batch() for _ in range(COPIES)]
    contenders = [
        Contender(name, partial(_mean_loss, task), tuple(task.parameters()))
        for name, task in zip(("references", "auto"), tasks, strict=True)
    ]
    shape = f"2 layers B={len(lengths)} T={total} D=50"
    flops = tasks[1].flops(lengths)
    copies = [(batch,) for batch in batches]
    return compare("train-step", shape, contenders, copies, device, repeats=repeats, flops=(flops, 2.0 * flops))


def long_sequences(device: Device, repeats: int) -> list[Row]:
    """Loss and gradients of sequences of up to 4,096 events, all of them and by Stochastic Length with alpha 1.6.

    What is saved of the attention's operations is counted over `EPOCHS` epochs of the sequences, of which the first
    ones are timed.
    """
    facts = DataFacts(ITEMS, range(1, ITEMS + 1), None, True)
    task = build_task(resolve(Config(model=ModelConfig(max_seq_len=LONG))), facts).to(device.torch_device)
    rule = StochasticLength(1.6, LONG, seed=42, selection="weighted")
    sequences = np.arange(SEQUENCES)
    spread = torch.exp(torch.randn(SEQUENCES, dtype=torch.float64) * 0.8) * LONG / 2
    lengths = spread.to(torch.int64).clamp(1, LONG).numpy()
    sizes = lengths + 1
    item_ids = torch.randint(1, ITEMS + 1, (int(sizes.sum()),)).numpy()
    times = np.concatenate([torch.randint(10**8, (size,)).sort().values.numpy() for size in sizes.tolist()])
    whole = windows_batch(sequences, sizes, item_ids, times).to(device.torch_device)
    in_part = [
        windows_batch(sequences, sizes, item_ids, times, partial(rule.kept, epoch)).to(device.torch_device)
        for epoch in range(EPOCHS)
    ]

    def all_events(whole: JaggedBatch, in_part: JaggedBatch, *parameters: Tensor) -> Tensor:
        return _mean_loss(task, whole)

    def stochastic_length(whole: JaggedBatch, in_part: JaggedBatch, *parameters: Tensor) -> Tensor:
        return _mean_loss(task, in_part)

    parameters = tuple(task.parameters())
    contenders = [
        Contender("all events", all_events, parameters),
        Contender("stochastic length", stochastic_length, parameters),
    ]
    shape = f"2 layers N={LONG} B={SEQUENCES} T={whole.tokens} D=50"
    rows = compare("train-step", shape, contenders, [(whole, part) for part in in_part], device, repeats=repeats)
    cost = replace(SequenceCost.from_flops(task.flops), linear=0.0)  # of the attention alone
    saved, expected = attention_saved(cost, rule, lengths, [part.offsets.diff().cpu().numpy() for part in in_part])
    return [rows[0], replace(rows[1], attention_flops_saved=saved, attention_flops_saved_expected=expected)]


def attention_saved(
    cost: SequenceCost, rule: StochasticLength, lengths: np.ndarray, read: list[np.ndarray]
) -> tuple[float, float]:
    """Share of the attention's cost that is saved where of sequences of `lengths [B]` events only `read` are read, and
    what the rule is expected to save.

    Args:
        read: for each epoch the events read of each sequence, `[B]`.
    """
    every = float(cost(lengths).sum())
    whole = rule.probability_whole(lengths)
    expected = float((whole * cost(lengths) + (1 - whole) * cost(np.minimum(lengths, rule.part))).sum())
    return 1 - sum(float(cost(part).sum()) for part in read) / len(read) / every, 1 - expected / every


def _mean_loss(task: Task, batch: JaggedBatch, *parameters: Tensor) -> Tensor:
    losses, weights = task.loss(task.prepare(batch, 0))
    return losses / weights
