"""From a configuration to the parts of a run: data, splits, model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from npu_rec.config import Config, load_config
from npu_rec.data import SequenceStore, prepare
from npu_rec.data.features import encode_features
from npu_rec.data.splits import Split, share_of, train_item_counts
from npu_rec.device import Device, get_device
from npu_rec.errors import DataError
from npu_rec.ops import OPERATORS
from npu_rec.registry import lookup, options_of, resolve
from npu_rec.tasks import DataFacts


def load_run_config(path: str | Path, overrides: list[str] | None = None, given_by: str = "--set") -> Config:
    """Read a configuration, import its extensions and check every name and option in it."""
    config = resolve(load_config(path, overrides, given_by))
    for name, backend in config.ops.model_dump().items():
        if backend != "auto":
            OPERATORS[name].find(backend)
    return config


@dataclass(frozen=True)
class RunData:
    """Prepared data, split by the protocol."""

    path: Path
    store: SequenceStore
    splits: dict[str, Split]
    facts: DataFacts


def open_device(config: Config) -> Device:
    """The configured device, with its threads set."""
    device = get_device(config.device.backend)
    device.set_threads(config.device.threads)
    return device


def open_data(config: Config) -> RunData:
    """Prepare the data set when that has not been done, and split it."""
    path = prepare(config.data)
    store = SequenceStore(path)
    task, options = lookup("task", config.task.name).target, options_of(config, "task")
    splits = task.make_splits(store, config, options)
    splits["train"] = share_of(splits["train"], config.data.fraction, config.train.seed)
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(
                f"{config.data.name}: no sequence is long enough for the {name} split of {config.eval.protocol}"
            )
    counted = task.needs_item_counts(options)
    facts = DataFacts(
        num_items=store.num_items,
        catalogue=_catalogue(store, config.data.catalogue),
        item_counts=torch.from_numpy(train_item_counts(splits["train"], store.num_items)) if counted else None,
        has_times=store.has_times,
        num_actions=store.num_actions,
        features=encode_features(store, task.wanted_features(options)),
    )
    return RunData(path, store, splits, facts)


def _catalogue(store: SequenceStore, which: Literal["all", "seen"]) -> Tensor | range:
    items = store.catalogue(which)
    every = len(items) == store.num_items  # ascending, from 1 on
    return range(1, store.num_items + 1) if every else torch.from_numpy(items.copy())
