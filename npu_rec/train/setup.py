"""From a configuration to the parts of a run: data, splits, model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from npu_rec.config import Config, load_config
from npu_rec.data import SequenceStore, prepare
from npu_rec.data.splits import Split, make_splits, train_item_counts
from npu_rec.device import Device, get_device
from npu_rec.errors import DataError
from npu_rec.evaluation import compute_metrics
from npu_rec.ops import OPERATORS
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts


def load_run_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a configuration, import its extensions and check every name and option in it."""
    config = resolve(load_config(path, overrides))
    for name, backend in config.ops.model_dump().items():
        if backend != "auto":
            OPERATORS[name].find(backend)
    compute_metrics(torch.ones(1, dtype=torch.int64), config.eval.metrics)  # a wrong `@k` shows before training
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
    splits = make_splits(store, config.eval.protocol, config.model.max_seq_len)
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(
                f"{config.data.name}: no sequence is long enough for the {name} split of {config.eval.protocol}"
            )
    facts = DataFacts(
        num_items=store.num_items,
        catalogue=torch.from_numpy(store.catalogue(config.data.catalogue).copy()),
        item_counts=torch.from_numpy(train_item_counts(splits["train"], store.num_items)),
        has_times=store.has_times,
    )
    return RunData(path, store, splits, facts)
