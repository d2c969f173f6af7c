"""What the trainer and the evaluator need of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from npu_rec.config import Config
from npu_rec.data import SequenceStore
from npu_rec.data.features import Features, Wanted
from npu_rec.data.splits import Split, leave_one_out
from npu_rec.distributed import World
from npu_rec.distributed.context import ContextShard
from npu_rec.distributed.world import ALONE
from npu_rec.embedding import EmbeddingCollection, Plan
from npu_rec.errors import ConfigError
from npu_rec.evaluation.ranking import compute_metrics
from npu_rec.models.encoder import SequenceEncoder
from npu_rec.registry import lookup, options_of

MOST_ACTIONS = 65_536


@dataclass(frozen=True)
class DataFacts:
    """What a model must know of its data set. Saved with a checkpoint.

    Attributes:
        num_items: the largest item id.
        catalogue: the items that are ranked and drawn as negatives, `[C]` int64, ascending; a range from 1 on where
            they are all the ids there are.
        item_counts: `[num_items + 1]` int64, occurrences in training; None where the task does not need them.
        has_times: whether events have times.
        features: what is encoded of items and users, where the task asks for it (`Task.wanted_features`).
        num_actions: the largest action and one; 0 for data without actions.
    """

    num_items: int
    catalogue: Tensor | range
    item_counts: Tensor | None
    has_times: bool
    num_actions: int = 0
    features: Features = field(default_factory=Features)


@dataclass(frozen=True)
class Prepared:
    """A training batch with everything that can be known before its step.

    Attributes:
        epoch: keys the random draws.
        draws: what the task drew, on the device of the batch.
        plan: which rows of the tables the step reads.
        context: with context parallel, what the tokens here are of their sequences; the batch holds those alone.
    """

    batch: Any  # of the class that the task's splits make
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

    @classmethod
    def plannable(cls, options: Any) -> bool:
        """Whether what a step works on is known without the data, so that it can be planned and simulated."""
        return True

    @classmethod
    def wanted_features(cls, options: Any) -> Wanted:
        """The features of items and users that `DataFacts.features` must have."""
        return Wanted()

    @classmethod
    def make_splits(cls, store: SequenceStore, config: Config, options: Any) -> dict[str, Split]:
        """What trains, validates and tests; leave-one-out unless the task says otherwise.

        Raises:
            ConfigError: the protocol is not one of the task's.
        """
        return leave_one_out(store, leave_one_out_protocol(config), config.model.max_seq_len)

    @classmethod
    def check(cls, config: Config, options: Any) -> None:
        """Raise ConfigError where the configuration asks for what is not the task's, as far as that needs no data.

        Here: metrics by rank, leave-one-out, and a backbone that needs no candidates.
        """
        check_backbone(config, candidates=False)
        leave_one_out_protocol(config)
        names, select = config.eval.metrics, config.eval.select
        compute_metrics(torch.ones(1, dtype=torch.int64), names)
        if select not in names:
            raise ConfigError(f"eval.select: {select!r} is not among eval.metrics {names}")

    @classmethod
    def lower_is_better(cls, metric: str) -> bool:
        """Whether a smaller value of the metric is the better one."""
        return False

    @abstractmethod
    def prepare(self, batch: Any, epoch: int) -> Prepared:
        """Draw what is random and plan the lookups; nothing here depends on a parameter.

        It may run on the host while the device trains on the batch before.
        """

    @abstractmethod
    def loss(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """(sum of the weighted losses, sum of the weights) over this rank's batch, both scalars."""

    @abstractmethod
    def observe(self, batch: Any) -> Tensor:
        """What metrics are made of, `[B, ...]`, for the held-out event of every row."""

    @abstractmethod
    def metrics(self, observed: Tensor, names: list[str]) -> dict[str, float]:
        """Metrics of `observe` over all sequences of a split."""

    def ranks(self, batch: Any) -> Tensor:
        """Rank, from 1, of the held-out item of each sequence, `[B]` int64; optional."""
        raise NotImplementedError(f"task {type(self).__name__} ranks no items")

    def predictions(self, observed: Tensor) -> dict[str, Tensor]:
        """Columns `[M]` of what `observe` gave for all rows: `item_id`, the judged item, scores, labels; optional."""
        raise NotImplementedError(f"task {type(self).__name__} predicts no labels")

    def top_k(self, batch: Any, k: int) -> tuple[Tensor, Tensor]:
        """The best k items of each, optional: (ids `[B, k]`, scores `[B, k]`); id 0 fills up a short list."""
        raise NotImplementedError(f"task {type(self).__name__} makes no recommendations")

    def log_likelihood(self, batch: Any) -> Tensor:
        """Log-probability of each held-out item among the whole catalogue, `[B]` float32, in nats; optional."""
        raise NotImplementedError(f"task {type(self).__name__} gives items no probability")

    @abstractmethod
    def flops(self, lengths: Tensor) -> float:
        """Floating-point operations of one forward pass with loss over sequences of `lengths [B]`."""


def leave_one_out_protocol(config: Config) -> Literal["holdout", "meta"]:
    """`eval.protocol`. Raises ConfigError for one of another kind."""
    if config.eval.protocol == "time":
        raise ConfigError(f"eval.protocol: time is for task.name ranking, not {config.task.name}")
    return config.eval.protocol


def check_actions(store: SequenceStore, key: str, instead: str) -> None:
    """Raise ConfigError where there cannot be a vector for each action."""
    if store.least_action < 0:
        raise ConfigError(
            f"{key} needs actions of 0 or more, the data set has {store.least_action}: {instead}, or number them anew"
        )
    if store.num_actions > MOST_ACTIONS:
        raise ConfigError(
            f"{key} has a vector for each action, and the data set's actions go up to {store.num_actions - 1:,}: "
            f"{instead}, or put them in at most {MOST_ACTIONS:,} groups beforehand"
        )


def check_backbone(config: Config, *, candidates: bool) -> None:
    """Raise ConfigError where the backbone needs candidates behind a history, and there are none."""
    if lookup("model", config.model.backbone).target.needs_targets and not candidates:
        raise ConfigError(
            f"model.backbone: {config.model.backbone} needs candidates behind a history: task.name ranking with "
            "task.options.layout merged"
        )


def build_encoder(config: Config, facts: DataFacts, world: World, *, max_seq_len: int) -> SequenceEncoder:
    """The encoder a configuration names, for histories of `max_seq_len` tokens.

    Raises:
        ConfigError: the backbone needs what the data does not have.
    """
    encoder = SequenceEncoder(
        config.model.model_copy(update={"max_seq_len": max_seq_len}),
        options_of(config, "model"),
        config.ops,
        num_items=facts.num_items,
        seed=config.train.seed,
        embedding=config.embedding,
        world=world,
    )
    if encoder.backbone.needs_times and not facts.has_times:
        raise ConfigError(
            f"data.name: {config.data.name} has no times, but model.backbone {config.model.backbone} uses a "
            "time bias; set model.options.bias to position"
        )
    return encoder


def build_task(config: Config, facts: DataFacts, world: World = ALONE) -> Task:
    """The task a resolved configuration names, initialised from `train.seed`; in a world, this rank's part of it."""
    target = lookup("task", config.task.name).target
    if config.parallel.context > 1 and not target.takes_context:
        raise ConfigError(f"parallel.context: task.name {config.task.name} cannot share sequences among ranks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        task = target(config, options_of(config, "task"), facts, world)
    assert isinstance(task, Task)
    able = [module for module in task.modules() if hasattr(module, "recompute")]
    if config.train.recompute and not able:
        raise ConfigError(f"train.recompute: model.backbone {config.model.backbone} has no blocks that can do it")
    for module in able:
        module.recompute = config.train.recompute  # type: ignore[assignment]
    return task
