"""What the trainer and the evaluator need of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npu_rec.config import Config
from npu_rec.data.batch import JaggedBatch
from npu_rec.errors import ConfigError
from npu_rec.registry import lookup, options_of


@dataclass(frozen=True)
class DataFacts:
    """What a model must know of its data set. Saved with a checkpoint.

    Attributes:
        num_items: the largest item id.
        catalogue: `[C]` int64, ascending: the items that are ranked and drawn as negatives.
        item_counts: `[num_items + 1]` int64, occurrences in training.
        has_times: whether events have times.
    """

    num_items: int
    catalogue: Tensor
    item_counts: Tensor
    has_times: bool


class Task(nn.Module, ABC):
    """A trainable task. Register one with `@register("task", name, options=Schema)`."""

    @abstractmethod
    def __init__(self, config: Config, options: Any, facts: DataFacts) -> None:
        super().__init__()

    @abstractmethod
    def loss(self, batch: JaggedBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """(sum of the weighted losses, sum of the weights), both scalars. `epoch` keys the random draws."""

    @abstractmethod
    def evaluate(self, batches: Iterable[JaggedBatch], metrics: list[str]) -> dict[str, float]:
        """Metrics over the held-out event of every sequence of the batches."""

    def ranks(self, batch: JaggedBatch) -> Tensor:
        """Rank, from 1, of the held-out item of each sequence, `[B]` int64."""
        raise ConfigError(f"task {type(self).__name__} ranks no items")

    def top_k(self, batch: JaggedBatch, k: int) -> tuple[Tensor, Tensor]:
        """The best k items after each sequence: (ids `[B, k]`, scores `[B, k]`); id 0 fills up a short list."""
        raise ConfigError(f"task {type(self).__name__} makes no recommendations")

    @abstractmethod
    def flops(self, lengths: Tensor) -> float:
        """Floating-point operations of one forward pass with loss over sequences of `lengths [B]`."""


def build_task(config: Config, facts: DataFacts) -> Task:
    """The task a resolved configuration names, initialised from `train.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        task = lookup("task", config.task.name).target(config, options_of(config, "task"), facts)
    assert isinstance(task, Task)
    for module in task.modules():
        if hasattr(module, "recompute"):
            module.recompute = config.train.recompute  # type: ignore[assignment]
    return task
