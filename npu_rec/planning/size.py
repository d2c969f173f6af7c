"""What planning must know of a data set, and the batch that it imagines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from npu_rec.config import Config
from npu_rec.data.batch import JaggedBatch
from npu_rec.errors import ConfigError
from npu_rec.registry import lookup, options_of
from npu_rec.tasks import DataFacts
from npu_rec.train.setup import open_data


def facts_of(config: Config) -> DataFacts:
    """Of the configured data set: from its recipe where that states them, otherwise from the data, prepared if need be.

    A stated data set is taken to have its ids from 1 on, all of them in the catalogue, each once.
    """
    if not lookup("task", config.task.name).target.plannable(options_of(config, "task")):
        raise ConfigError(f"task.name: {config.task.name} cannot be planned like this: its steps depend on data")
    stated = lookup("data", config.data.name).target.states(options_of(config, "data"))
    if stated is None:
        return open_data(config).facts
    counted = lookup("task", config.task.name).target.needs_item_counts(options_of(config, "task"))
    items = range(1, stated.num_items + 1)
    counts = torch.ones(stated.num_items + 1, dtype=torch.int64) if counted else None
    return DataFacts(stated.num_items, items, counts, stated.has_times)


@dataclass(frozen=True)
class Load:
    """What each group of `parallel.context` ranks works on in a step.

    Attributes:
        sequences: of the group with the most.
        length: events of each.
        mean_sequences: of all groups.
        accumulate: such batches of one optimiser step.
    """

    sequences: int
    length: int
    mean_sequences: float
    accumulate: int

    @property
    def imbalance(self) -> float:
        """Tokens of the group with the most over the mean."""
        return self.sequences / self.mean_sequences


def load_of(config: Config, ranks: int, length: int | None) -> Load:
    """The step of a configuration when every sequence has `length` events (None: `model.max_seq_len`).

    Raises:
        ConfigError: the length is not one that the model takes, or the ranks cannot be divided.
    """
    longest = config.model.max_seq_len
    if length is not None and not 1 <= length <= longest:
        raise ConfigError(f"--length {length}: the model sees 1 to {longest} events (model.max_seq_len)")
    length = length or longest
    sharing = config.parallel.context if ranks > 1 else 1
    if ranks % sharing:
        raise ConfigError(f"parallel.context: {ranks} cards cannot be divided into groups of {sharing}")
    sequences = config.train.batch_size
    if config.train.batch_tokens is not None:
        sequences = max(1, min(sequences, config.train.batch_tokens // length))
    groups = ranks // sharing
    return Load(-(-sequences // groups), length, sequences / groups, config.train.accumulate)


def imagined_batch(facts: DataFacts, load: Load, group: int, seed: int = 0) -> JaggedBatch:
    """Sequences of uniform random items, an event an hour.

    Args:
        group: the number of the ranks that share these sequences; groups have different ones.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + group)
    count, length = load.sequences, load.length
    events = torch.randint(1, facts.num_items + 1, (count, length + 1), generator=generator)
    if isinstance(facts.catalogue, torch.Tensor):
        events = facts.catalogue[events % facts.catalogue.shape[0]]
    times = (1_600_000_000 + 3600 * torch.arange(length + 1)).expand(count, -1) if facts.has_times else None
    return JaggedBatch(
        sequence_ids=group * count + torch.arange(count),
        offsets=torch.arange(count + 1) * length,
        item_ids=events[:, :-1].flatten(),
        next_ids=events[:, 1:].flatten(),
        times=None if times is None else times[:, :-1].flatten(),
        next_times=None if times is None else times[:, 1:].flatten(),
    )
