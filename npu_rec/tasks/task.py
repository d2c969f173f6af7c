"""What the trainer and the evaluator need of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from npu_rec.config import Config
from npu_rec.data.batch import JaggedBatch
from npu_rec.distributed import World
from npu_rec.distributed.context import ContextShard
from npu_rec.distributed.world import ALONE
from npu_rec.embedding import EmbeddingCollection, Plan
from npu_rec.errors import ConfigError
from npu_rec.registry import lookup, options_of


@dataclass(frozen=True)
class DataFacts:
    """What a model must know of its data set. Saved with a checkpoint.

    Attributes:
        num_items: the largest item id.
        catalogue: the items that are ranked and drawn as negatives, `[C]` int64, ascending; a range from 1 on where
            they are all the ids there are.
        item_counts: `[num_items + 1]` int64, occurrences in training; None where the task does not need them.
        has_times: whether events have times.
    """

    num_items: int
    catalogue: Tensor | range
    item_counts: Tensor | None
    has_times: bool


@dataclass(frozen=True)
class Prepared:
    """A training batch with everything that can be known before its step.

    Attributes:
        epoch: keys the random draws.
        draws: what the task drew, on the device of the batch.
        plan: which rows of the tables the step reads.
        context: with context parallel, what the tokens here are of their sequences; the batch holds those alone.
    """

    batch: JaggedBatch
    epoch: int
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    plan: Plan = field(default_factory=dict)
    context: ContextShard | None = None

    def to(self, device: torch.device) -> Prepared:
        """The same on a device."""
        return replace(
            self,
            batch=self.batch.to(device),
            draws={name: draw.to(device, non_blocking=True) for name, draw in self.draws.items()},
            plan={name: plan.to(device) for name, plan in self.plan.items()},
            context=None if self.context is None else self.context.to(device),
        )


class Task(nn.Module, ABC):
    """A trainable task. Register one with `@register("task", name, options=Schema)`.

    Attributes:
        world: the ranks that train together.
        takes_context: `prepare` and `loss` share sequences among ranks as `parallel.context` says.
        tables: its embedding tables, which `build_tables` gave this rank's part of.
    """

    tables: EmbeddingCollection
    takes_context: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, config: Config, options: Any, facts: DataFacts, world: World = ALONE) -> None:
        super().__init__()
        self.world = world

    @classmethod
    def needs_item_counts(cls, options: Any) -> bool:
        """Whether `DataFacts.item_counts` must be there; 8 bytes for every id up to the largest."""
        return True

    @abstractmethod
    def prepare(self, batch: JaggedBatch, epoch: int) -> Prepared:
        """Draw what is random and plan the lookups; nothing here depends on a parameter.

        It may run on the host while the device trains on the batch before.
        """

    @abstractmethod
    def loss(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """(sum of the weighted losses, sum of the weights) over this rank's batch, both scalars."""

    @abstractmethod
    def observe(self, batch: JaggedBatch) -> Tensor:
        """What metrics are made of, `[B, ...]`, for the held-out event of every sequence."""

    @abstractmethod
    def metrics(self, observed: Tensor, names: list[str]) -> dict[str, float]:
        """Metrics of `observe` over all sequences of a split."""

    def ranks(self, batch: JaggedBatch) -> Tensor:
        """Rank, from 1, of the held-out item of each sequence, `[B]` int64."""
        raise ConfigError(f"task {type(self).__name__} ranks no items")

    def top_k(self, batch: JaggedBatch, k: int) -> tuple[Tensor, Tensor]:
        """The best k items after each sequence: (ids `[B, k]`, scores `[B, k]`); id 0 fills up a short list."""
        raise ConfigError(f"task {type(self).__name__} makes no recommendations")

    @abstractmethod
    def flops(self, lengths: Tensor) -> float:
        """Floating-point operations of one forward pass with loss over sequences of `lengths [B]`."""


def build_task(config: Config, facts: DataFacts, world: World = ALONE) -> Task:
    """The task a resolved configuration names, initialised from `train.seed`; in a world, this rank's part of it."""
    target = lookup("task", config.task.name).target
    if world.size > 1 and config.parallel.context > 1 and not target.takes_context:
        raise ConfigError(f"parallel.context: task.name {config.task.name} cannot share sequences among ranks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        task = target(config, options_of(config, "task"), facts, world)
    assert isinstance(task, Task)
    for module in task.modules():
        if hasattr(module, "recompute"):
            module.recompute = config.train.recompute  # type: ignore[assignment]
    return task
