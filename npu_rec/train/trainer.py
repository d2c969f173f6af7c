"""The training loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from npu_rec.config import Config, load_resolved
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.loader import TrainLoader
from npu_rec.device import Device, device_report
from npu_rec.errors import CheckpointError, ConfigError, TrainingError
from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.tasks import build_task
from npu_rec.train import checkpoint as ckpt
from npu_rec.train.evaluate import evaluate_split
from npu_rec.train.optim import (
    attach_row_optimizers,
    build_optimizer,
    learning_rate,
    row_learning_rate,
    table_weights,
)
from npu_rec.train.profile import StepProfiler
from npu_rec.train.progress import TrainProgress
from npu_rec.train.report import write_report
from npu_rec.train.run_dir import RunDirectory
from npu_rec.train.setup import RunData, open_data, open_device
from npu_rec.train.throughput import matmul_flops
from npu_rec.train.weights import read_weights

log = logging.getLogger(__name__)


@dataclass
class Position:
    """Where training stands; saved with every checkpoint.

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


@dataclass(frozen=True)
class TrainResult:
    """What `npu-rec train` prints."""

    run_dir: Path
    checkpoint: Path
    report: Path
    metrics: dict[str, dict[str, float]]
    seconds: float
    resumed_from_step: int | None
    extra: dict[str, Any] = field(default_factory=dict)


def train(config: Config, *, run_dir: str | Path | None = None, resume: str | None = None) -> TrainResult:
    """Train a resolved configuration.

    Args:
        run_dir: the run's folder; `runs/<name>` by default.
        resume: None for a new run, `auto` for the newest checkpoint in `run_dir` (a new run when there is
            none), or the path of a checkpoint.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ConfigError(f"WORLD_SIZE is {world}: training on several processes does not exist yet; start one process")
    device = open_device(config)
    run = RunDirectory(Path(run_dir) if run_dir is not None else _default_run_dir(config, resume))
    with run.lock():
        found = _find_checkpoint(run, resume)
        if found is None and run.used and resume != "auto":
            raise ConfigError(
                f"{run.path} holds a run already: `--resume auto` continues it, `--run-dir PATH` or `--set name=NAME` "
                "starts another beside it"
            )
        return _Trainer(config, run, device, open_data(config), found).run()


def _default_run_dir(config: Config, resume: str | None) -> Path:
    if resume not in (None, "auto") and Path(resume).parent.name == "checkpoints":
        return Path(resume).parent.parent
    return Path("runs") / config.name


def _find_checkpoint(run: RunDirectory, resume: str | None) -> ckpt.Checkpoint | None:
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        if path.resolve().parent != run.checkpoints.resolve():
            raise ConfigError(
                f"--resume {path} is no checkpoint of {run.path}; train.init_from starts a new run from it"
            )
        return ckpt.open_checkpoint(path)
    ckpt.remove_partial(run.checkpoints)
    steps = ckpt.list_steps(run.checkpoints)
    return ckpt.open_checkpoint(run.checkpoints / f"step-{steps[-1]}") if steps else None


# What may differ between a run and its continuation; anything else would make it a different run.
_MAY_CHANGE = {
    "name", "imports", "device", "data.source", "data.dir", "ops", "eval.every", "eval.batch_size",
    "train.epochs", "train.max_steps", "train.checkpoint_every", "train.keep_checkpoints", "train.early_stop",
    "train.init_from", "train.log_every", "train.profile", "train.recompute",
}  # fmt: skip


def _check_same_run(config: Config, found: ckpt.Checkpoint) -> None:
    old = load_resolved(found.config_path).model_dump(mode="json")
    new = config.model_dump(mode="json")
    for section, values in new.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        for key, value in pairs:
            name = f"{section}.{key}" if key else section
            before = old[section][key] if key else old[section]
            if value != before and name not in _MAY_CHANGE and section not in _MAY_CHANGE:
                raise ConfigError(
                    f"{name} is {value!r}, the run in {found.path} was trained with {before!r}; resume with that "
                    "value, or start a new run with train.init_from"
                )


class _Trainer:
    def __init__(
        self, config: Config, run: RunDirectory, device: Device, data: RunData, found: ckpt.Checkpoint | None
    ) -> None:
        self.config, self.run_dir, self.device, self.data, self.found = config, run, device, data, found
        self.task = build_task(config, data.facts)
        self.task.to(device.torch_device)  # before the optimiser: moving may replace parameters
        self.row_optimizers = attach_row_optimizers(self.task, config)
        self.optimizer = build_optimizer(self.task, config.train)
        self.position = Position()
        device.manual_seed(config.train.seed)
        if found is not None:
            self._restore(found)
        elif config.train.init_from is not None:
            if config.train.init_from.is_dir():
                ckpt.open_checkpoint(config.train.init_from).check_items(data.path / "items.arrow")
            ckpt.load_weights(self.task, read_weights(config.train.init_from), str(config.train.init_from))
        self.loader = TrainLoader(
            data.splits["train"],
            batch_size=config.train.batch_size,
            batch_tokens=config.train.batch_tokens,
            seed=config.train.seed,
        )
        steps_an_epoch = math.ceil(len(self.loader.batches(0)) / config.train.accumulate)
        self.total_steps = config.train.epochs * steps_an_epoch  # of the schedule; token budgets vary a little by epoch
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        self.metrics: dict[str, dict[str, float]] = {}

    def _restore(self, found: ckpt.Checkpoint) -> None:
        _check_same_run(self.config, found)
        found.check_items(self.data.path / "items.arrow")
        names = Position.__dataclass_fields__
        if "position" not in found.state:
            raise CheckpointError(f"{found.path}: holds weights alone; start from it with train.init_from")
        self.position = Position(**{k: v for k, v in found.state["position"].items() if k in names})
        ckpt.drop_later(self.run_dir.checkpoints, self.position.step)
        ckpt.load_weights(self.task, found.tensors("model"), str(found.path))
        ckpt.load_optimizer(self.task, self.optimizer, found.tensors("optimizer"))
        random_states = found.tensors("random")
        torch.set_rng_state(random_states["host"])
        self.device.set_rng_state(random_states.get("device"))

    def run(self) -> TrainResult:
        start = perf_counter()
        position, config = self.position, self.config
        resumed = position.step if self.found is not None else None
        environment = {**device_report(), "threads": torch.get_num_threads()}
        self.run_dir.start(config, environment, metrics_bytes=position.metrics_bytes, step=position.step)
        if not self._finished():
            self._fit(resumed)
        final = self._test()
        self.run_dir.close()
        write_report(self.run_dir, config, self.metrics, position.train_seconds)
        return TrainResult(
            run_dir=self.run_dir.path,
            checkpoint=final,
            report=self.run_dir.report_path,
            metrics=self.metrics,
            seconds=perf_counter() - start,
            resumed_from_step=resumed,
            extra={"train_seconds": position.train_seconds, "steps": position.step},
        )

    def _fit(self, resumed: int | None) -> None:
        config, position = self.config, self.position
        self.peak_flops = matmul_flops(self.device, self.dtype or torch.float32)
        parameters = sum(p.numel() for p in self.task.parameters())
        with (
            TrainProgress(
                min(self.total_steps, config.train.max_steps or self.total_steps), position.step
            ) as self.progress,
            StepProfiler(config.train.profile, self.device, self.run_dir.path / "profile") as self.profiler,
        ):
            if resumed is not None:
                self.progress.line(f"resumed from step {resumed} (epoch {position.epoch + 1}, batch {position.batch})")
            self.progress.line(
                f"training {config.name}: {len(self.data.splits['train']):,} sequences, {parameters:,} parameters, "
                f"{self.total_steps:,} steps on {self.device.name}"
            )
            self.task.train()
            while not self._finished():
                self._epoch()

    def _out_of_steps(self) -> bool:
        return self.config.train.max_steps is not None and self.position.step >= self.config.train.max_steps

    def _finished(self) -> bool:
        train, position = self.config.train, self.position
        stopped_early = train.early_stop is not None and position.evaluations_without_gain >= train.early_stop
        return position.epoch >= train.epochs or stopped_early or self._out_of_steps()

    def _epoch(self) -> None:
        position, train = self.position, self.config.train
        batches = len(self.loader.batches(position.epoch))
        for group in _groups(self.loader.epoch(position.epoch, position.batch), train.accumulate):
            self._step(group)
            if self._out_of_steps():
                break
            if train.checkpoint_every and position.step % train.checkpoint_every == 0 and position.batch < batches:
                self._save()
        epoch, mean = position.epoch + 1, position.loss_sum / (position.weight_sum or 1.0)
        self.run_dir.log("train", position.step, epoch, {"loss": mean, "epoch_loss": mean})
        text = f"epoch {epoch}: loss {mean:.4f}"
        improved = False
        last = epoch == train.epochs or self._out_of_steps()
        if "valid" in self.data.splits and (epoch % self.config.eval.every == 0 or last):
            improved, shown = self._validate()
            text += f", {shown}"
        self.progress.line(f"{text} ({position.train_seconds:.1f} s of training)")
        if position.batch == batches:
            position.epoch, position.batch, position.loss_sum, position.weight_sum = epoch, 0, 0.0, 0.0
        due = not train.checkpoint_every or position.step % train.checkpoint_every == 0
        if improved or due or self._finished():
            self._save()

    def _step(self, group: list[JaggedBatch]) -> None:
        position, train = self.position, self.config.train
        start = perf_counter()
        lr = learning_rate(train, position.step, self.total_steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        for rows in self.row_optimizers:
            rows.lr = row_learning_rate(self.config, lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, weight_sum = 0.0, 0.0
        lengths = [offsets_to_lengths(batch.offsets) for batch in group]
        group = [batch.to(self.device.torch_device) for batch in group]
        for batch in group:
            with self.device.autocast(self.dtype):
                losses, weights = self.task.loss(batch, position.epoch)
            if not self.row_optimizers:
                losses.backward()
            loss_sum += float(losses.detach())
            weight_sum += float(weights)
            if self.row_optimizers and math.isfinite(loss_sum):  # rows change in the backward pass: later is too late
                (losses / (weight_sum or 1.0)).backward()  # the only batch of the step (config.py)
        for parameter in self.task.parameters():
            if parameter.grad is not None and not self.row_optimizers:
                parameter.grad /= weight_sum or 1.0  # known only now; the same mean however the batch is cut
        norm = self._gradient_norm()
        position.batch += len(group)
        position.step += 1
        if math.isfinite(loss_sum) and math.isfinite(norm):
            self.optimizer.step()
            position.loss_sum += loss_sum
            position.weight_sum += weight_sum
        elif train.nan == "skip":
            position.skipped_steps += 1
            log.warning("step %d skipped: loss %s, gradient norm %s", position.step, loss_sum, norm)
        else:
            rates, clip = "train.lr", "train.clip_norm"
            if self.row_optimizers:
                rates, clip = "train.lr or embedding.lr", "train.clip_norm with train.clip: row"
            raise TrainingError(
                f"step {position.step} (epoch {position.epoch + 1}): loss {loss_sum}, gradient norm {norm}. "
                f"Lower {rates}, set {clip}, or set train.nan: skip; `--resume auto` goes on from the last checkpoint"
            )
        self.profiler.step()
        self.device.synchronize()
        seconds = perf_counter() - start
        position.train_seconds += seconds
        self._log_step(lengths, loss_sum / (weight_sum or 1.0), lr, norm, seconds)

    def _gradient_norm(self) -> float:
        apart = set() if self.config.train.clip == "global" else table_weights(self.task)
        parameters = [p for p in self.task.parameters() if p not in apart]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.config.train.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.train.clip_norm, norm, foreach=True)
        return float(norm)

    def _log_step(self, lengths: list[Tensor], loss: float, lr: float, norm: float, seconds: float) -> None:
        position, tokens = self.position, int(sum(x.sum() for x in lengths))
        flops = 3.0 * sum(self.task.flops(x) for x in lengths)
        speed = {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / self.peak_flops}
        if position.step % self.config.train.log_every == 0:
            values = {"loss": loss, "lr": lr, "gradient_norm": norm, "tokens": float(tokens), **speed}
            self.run_dir.log("train", position.step, position.epoch + 1, values)
        text = f"loss {loss:.4f}  {speed['tokens_per_second']:,.0f} tokens/s  {speed['mfu']:.1%} MFU"
        self.progress.step(position.step, position.epoch + 1, text)

    def _validate(self) -> tuple[bool, str]:
        position, select = self.position, self.config.eval.select
        values = evaluate_split(self.task, self.data.splits["valid"], self.config, self.device)
        self.run_dir.log("valid", position.step, position.epoch + 1, values)
        improved = position.best_value is None or values[select] > position.best_value
        if improved:
            position.best_value, position.best_step, position.evaluations_without_gain = (
                values[select],
                position.step,
                0,
            )
        else:
            position.evaluations_without_gain += 1
        return improved, f"valid {select} {values[select]:.4f}{' (best)' if improved else ''}"

    def _save(self) -> None:
        position = self.position
        position.metrics_bytes = self.run_dir.metrics_bytes
        random_states = {"host": torch.get_rng_state()}
        device_state = self.device.rng_state()
        if device_state is not None:
            random_states["device"] = device_state
        ckpt.save(
            self.run_dir.checkpoints / f"step-{position.step}",
            config=self.config,
            model=self.task,
            optimizer=self.optimizer,
            facts=self.data.facts,
            items=self.data.path / "items.arrow",
            state={"step": position.step, "position": asdict(position)},
            random_states=random_states,
        )
        ckpt.prune(self.run_dir.checkpoints, self.config.train.keep_checkpoints, position.best_step)

    def _test(self) -> Path:
        """Test the best epoch (holdout) or the last one (meta), once."""
        position = self.position
        step = position.step if position.best_step is None else position.best_step
        path = self.run_dir.checkpoints / f"step-{step}"
        if step != position.step:
            ckpt.load_weights(self.task, ckpt.open_checkpoint(path).tensors("model"), str(path))
        known = [line for line in self.run_dir.metrics() if line["split"] == "valid" and line["step"] == step]
        if known:
            self.metrics["valid"] = {k: v for k, v in known[-1].items() if k not in ("step", "epoch", "split")}
        self.metrics["test"] = evaluate_split(self.task, self.data.splits["test"], self.config, self.device)
        self.run_dir.log("test", step, position.epoch, self.metrics["test"])
        return path


def _groups(batches: Iterator[JaggedBatch], size: int) -> Iterator[list[JaggedBatch]]:
    group: list[JaggedBatch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
