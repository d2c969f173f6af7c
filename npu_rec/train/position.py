"""Where training stands, and from which checkpoint it goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_rec.config import Config, load_resolved
from npu_rec.errors import ConfigError
from npu_rec.registry import resolve
from npu_rec.train import checkpoint as ckpt
from npu_rec.train.run_dir import RunDirectory

log = logging.getLogger(__name__)


@dataclass
class Position:
    """Where training stands; saved with every checkpoint, the same on all ranks.

    Attributes:
        step: optimiser steps done.
        epoch: the epoch under way, from 0.
        batch: global batches of it that are done.
        loss_sum, weight_sum: over the epoch so far.
        train_seconds: time in training steps so far, over all sittings.
        best_step, best_value: of `eval.select` on the validation split.
        evaluations_without_gain: since the best one.
        skipped_steps: steps without an update because something was not finite.
        metrics_bytes: size of metrics.jsonl at that point.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    train_seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0
    metrics_bytes: int = 0


def default_run_dir(config: Config, resume: str | None) -> Path:
    """That of the checkpoint to go on from, or `runs/<name>`."""
    if resume not in (None, "auto") and Path(resume).parent.name == "checkpoints":
        return Path(resume).parent.parent
    return Path("runs") / config.name


def find_checkpoint(run: RunDirectory, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means; None: a new run.

    Raises:
        ConfigError: it belongs to another run, or the folder is used and nothing is to be resumed.
    """
    if resume is None:
        if run.used:
            raise ConfigError(
                f"{run.path} holds a run already: `--resume auto` continues it, `--run-dir PATH` or `--set name=NAME` "
                "starts another beside it"
            )
        return None
    if resume != "auto":
        path = Path(resume)
        if path.resolve().parent != run.checkpoints.resolve():
            raise ConfigError(
                f"--resume {path} is no checkpoint of {run.path}; train.init_from starts a new run from it"
            )
        return path
    ckpt.remove_partial(run.checkpoints)
    steps = ckpt.list_steps(run.checkpoints)
    return run.checkpoints / f"step-{steps[-1]}" if steps else None


# What may differ between a run and its continuation; anything else would make it a different run.
_MAY_CHANGE = {
    "name", "imports", "device", "parallel", "cluster", "data.source", "data.dir", "ops", "eval.every",
    "eval.batch_size", "embedding.placement", "embedding.replicas", "embedding.rows", "embedding.tier_path",
    "embedding.engine", "train.epochs", "train.max_steps", "train.checkpoint_every", "train.keep_checkpoints",
    "train.early_stop", "train.init_from", "train.log_every", "train.profile", "train.recompute", "train.delta_every",
    # what helps against values that are not finite
    "train.nan", "train.lr", "train.clip_norm", "train.clip", "embedding.lr",
}  # fmt: skip


def check_same_run(config: Config, found: ckpt.Checkpoint) -> None:
    """Raise ConfigError when the configuration would make another run of it."""
    for name, value, before in _differences(config, found):
        if not any(name == key or name.startswith(f"{key}.") for key in _MAY_CHANGE):
            raise ConfigError(
                f"{name} is {value!r}, the run in {found.path} was trained with {before!r}; resume with that "
                "value, or start a new run with train.init_from"
            )


def warn_of_another_model(config: Config, found: ckpt.Checkpoint) -> None:
    """Say what of the model and the task is not as the checkpoint was trained; dropout does not count."""
    for name, value, before in _differences(config, found):
        if name.split(".")[0] in ("model", "task") and "dropout" not in name:
            log.warning("%s is %r, the checkpoint %s was trained with %r", name, value, found.path, before)


def _differences(config: Config, found: ckpt.Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, value in the configuration, value in the checkpoint's."""
    before = load_resolved(found.config_path)
    before.imports = config.imports  # what was imported then may have moved
    with suppress(ConfigError):  # a component of then that is not known now differs by its name
        resolve(before)  # options that came later have their defaults
    yield from _unequal("", config.model_dump(mode="json"), before.model_dump(mode="json"))


def _unequal(name: str, new: Any, old: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(new, dict) and isinstance(old, dict):
        for key in {**new, **old}:
            yield from _unequal(f"{name}.{key}" if name else key, new.get(key), old.get(key))
    elif new != old:
        yield name, new, old
