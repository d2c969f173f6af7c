"""What is benchmarked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from npu_rec.bench import attention, balance, embedding, loss, norm_gate, train_step
from npu_rec.bench.harness import Row
from npu_rec.device import Device

SUITES: dict[str, Callable[[Device, int], list[Row]]] = {
    "attention": attention.run,
    "loss": loss.run,
    "embedding": embedding.run,
    "norm-gate": norm_gate.run,
    "train-step": train_step.run,
    "balance": balance.run,
}


def run_suite(name: str, device: Device, *, repeats: int = 5) -> list[Row]:
    """Run one of `SUITES`; the first contender of each case is the one the others are measured against."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SUITES[name](device, repeats)
