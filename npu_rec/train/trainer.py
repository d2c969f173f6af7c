"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from npu_rec.config import Config, dump_config
from npu_rec.data import prepare
from npu_rec.data.batch import Batch
from npu_rec.data.loader import TrainLoader, in_order
from npu_rec.data.stochastic_length import make_stochastic_length
from npu_rec.device import Device, device_report
from npu_rec.distributed import World, open_world
from npu_rec.distributed.balance import SequenceCost, imbalance
from npu_rec.embedding.touched import Touched
from npu_rec.errors import CheckpointError, ConfigError, TrainingError
from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.tasks import Prepared, build_task
from npu_rec.train import checkpoint as ckpt
from npu_rec.train.evaluate import evaluate_split
from npu_rec.train.optim import attach_row_optimizers, build_optimizer, learning_rate, table_weights
from npu_rec.train.parallel import DenseParallel
from npu_rec.train.position import Position, check_same_run, default_run_dir, find_checkpoint
from npu_rec.train.profile import StepProfiler
from npu_rec.train.progress import TrainProgress
from npu_rec.train.report import write_report
from npu_rec.train.run_dir import RunDirectory
from npu_rec.train.setup import RunData, open_data, open_device
from npu_rec.train.state import (
    keyed_rows,
    load_optimizers,
    load_weights,
    optimizer_parts,
    tables_of,
    touched_rows,
    weight_parts,
)
from npu_rec.train.step import Stepper, StepResult
from npu_rec.train.throughput import matmul_flops
from npu_rec.train.weights import open_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What `npu-rec train` prints, on the first rank."""

    run_dir: Path
    checkpoint: Path
    report: Path
    metrics: dict[str, dict[str, float]]
    seconds: float
    resumed_from_step: int | None
    extra: dict[str, Any] = field(default_factory=dict)
    is_first: bool = True


def train(config: Config, *, run_dir: str | Path | None = None, resume: str | None = None) -> TrainResult:
    """Train a resolved configuration; under torchrun, on all its processes.

    Args:
        run_dir: the run's folder; `runs/<name>` by default. All ranks must reach it.
        resume: None for a new run, `auto` for the newest checkpoint in `run_dir` (a new run when there is
            none), or the path of a checkpoint.
    """
    device = open_device(config)
    with open_world(device, timeout=config.parallel.timeout) as world:
        _check_alike(config, world)
        run = RunDirectory(Path(run_dir) if run_dir is not None else default_run_dir(config, resume), world)
        with run.lock():
            path = run.first_decides(lambda: find_checkpoint(run, resume), "which checkpoint to go on from")
            found = None if path is None else ckpt.open_checkpoint(path, world)
            ckpt.together(world, "data prepared", lambda: prepare(config.data) if world.is_first else None)
            return _Trainer(config, run, world, device, open_data(config), found).run()


def _check_alike(config: Config, world: World) -> None:
    """Raise ConfigError, on all ranks, when they were started with different configurations."""
    texts = [text.splitlines() for text in world.all_gather(dump_config(config), "configuration")]
    for rank, lines in enumerate(texts):
        for ours, first in zip_longest(lines, texts[0], fillvalue=""):
            if ours != first:
                raise ConfigError(
                    f"rank {rank} has {ours.strip()!r} where rank 0 has {first.strip()!r}; start all alike"
                )


class _Trainer:
    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        world: World,
        device: Device,
        data: RunData,
        found: ckpt.Checkpoint | None,
    ) -> None:
        self.config, self.run_dir, self.world, self.device = config, run, world, device
        self.data, self.found, self.position = data, found, Position()
        train = config.train
        self.stochastic_length = make_stochastic_length(
            train.stochastic_length,
            train.stochastic_selection,
            max_seq_len=config.model.max_seq_len,
            seed=train.seed,
            has_times=data.facts.has_times,
        )
        self.task = build_task(config, data.facts, world)
        self.task.to(device.torch_device)  # before the optimiser: moving may replace parameters
        row_optimizers = attach_row_optimizers(self.task, config, run.path / "tables")
        device.manual_seed(train.seed)
        if found is not None:
            self._check(found)
            load_weights(self.task, found, str(found.path))
        elif train.init_from is not None:
            weights = open_weights(train.init_from, world)
            if isinstance(weights, ckpt.Checkpoint):
                weights.check_items(data.path / "items.arrow")
            load_weights(self.task, weights, str(train.init_from), new_run=True)
        if train.delta_every:
            for table in self.task.tables.tables.values():
                table.touched = Touched()
        self.marked_step = 0  # what a delta would begin at
        self.best_written: int | None = None  # the best step as the newest checkpoint names it
        self.dense = DenseParallel(self.task, config.parallel, world, device, all_used=data.facts.has_times)
        self.optimizer = build_optimizer(self.task, train)
        if found is not None:
            self._restore(found)
        elif world.is_first:  # of a sitting that ended before its first checkpoint
            ckpt.drop_later_deltas(run.path / "deltas", 0)
        self.stepper = Stepper(self.task, config, world, device, self.optimizer, row_optimizers, self.dense)
        self.sharing = config.parallel.context if world.size > 1 else 1  # ranks that share each sequence
        self.cost = SequenceCost.from_flops(self.task.flops)
        self.loader = TrainLoader(
            data.splits["train"],
            batch_size=train.batch_size,
            batch_tokens=train.batch_tokens,
            seed=train.seed,
            rank=world.rank // self.sharing,
            world=world.size // self.sharing,
            share=self.cost.share if config.parallel.balance == "cost" else in_order,
            stochastic_length=self.stochastic_length,
        )
        steps_an_epoch = math.ceil(len(self.loader.batches(0)) / train.accumulate)
        self.total_steps = train.epochs * steps_an_epoch  # of the schedule; token budgets vary a little by epoch
        self.metrics: dict[str, dict[str, float]] = {}
        self.counters: dict[str, dict[str, float]] = {}
        # ids are exchanged ahead of a step, by a thread, where they must be known on the host
        self.plans_ahead = world.size > 1 or self.task.tables.needs_plan

    def _check(self, found: ckpt.Checkpoint) -> None:
        check_same_run(self.config, found)
        found.check_items(self.data.path / "items.arrow")
        if "position" not in found.state:
            raise CheckpointError(f"{found.path}: holds weights alone; start from it with train.init_from")

    def _restore(self, found: ckpt.Checkpoint) -> None:
        names = Position.__dataclass_fields__
        self.position = Position(**{k: v for k, v in found.state["position"].items() if k in names})
        self.task.tables.step = self.position.step
        self._keep_best()
        marked = found.state.get("marked_step")
        self.marked_step = self.position.step if marked is None else int(marked)
        if self.world.is_first:
            ckpt.drop_later(self.run_dir.checkpoints, self.position.step)
            ckpt.drop_later_deltas(self.run_dir.path / "deltas", self.position.step)
        load_optimizers(self.task, self.optimizer, found)
        random_states = found.tensors("random")
        torch.set_rng_state(random_states["host"])
        self.device.set_rng_state(random_states.get("device"))

    def _keep_best(self) -> None:
        """What an earlier checkpoint calls the best may have been deleted since."""
        best = self.position.best_step
        if best is not None and best != self.position.step:
            path = self.run_dir.checkpoints / f"step-{best}"
            if not self.run_dir.first_decides(path.is_dir, "best checkpoint there"):
                log.warning("%s, the best so far, is no longer there: the best is chosen from here on", path)
                self.position.best_step = self.position.best_value = None
                self.position.evaluations_without_gain = 0
        self.best_written = self.position.best_step

    def run(self) -> TrainResult:
        start = perf_counter()
        position, config = self.position, self.config
        resumed = position.step if self.found is not None else None
        environment = {**device_report(), "threads": torch.get_num_threads(), "processes": self.world.size}
        self.run_dir.start(config, environment, metrics_bytes=position.metrics_bytes, step=position.step)
        with ckpt.AsyncSaver(self.world) as self.saver:
            if not self._finished():
                self._fit(resumed)
                if config.train.delta_every and position.step > self.marked_step:
                    self._export_delta()
        final = self._test()
        self.run_dir.close()
        if self.world.is_first:
            write_report(self.run_dir, config, self.metrics, position.train_seconds)
        for table in self.task.tables.tables.values():
            table.close()
        return TrainResult(
            run_dir=self.run_dir.path,
            checkpoint=final,
            report=self.run_dir.report_path,
            metrics=self.metrics,
            seconds=perf_counter() - start,
            resumed_from_step=resumed,
            extra={"train_seconds": position.train_seconds, "steps": position.step},
            is_first=self.world.is_first,
        )

    def _fit(self, resumed: int | None) -> None:
        config, position = self.config, self.position
        self.peak_flops = matmul_flops(self.device, self.stepper.dtype or torch.float32) * self.world.size
        tables = [table.spec for table in self.task.tables.tables.values()]
        parameters = sum(p.numel() for p in self.task.parameters() if p not in table_weights(self.task))
        parameters += sum((spec.num_rows or 0) * spec.dim for spec in tables)
        shown = min(self.total_steps, config.train.max_steps or self.total_steps)
        with (
            TrainProgress(shown, position.step, quiet=not self.world.is_first) as self.progress,
            StepProfiler(
                config.train.profile if self.world.is_first else 0, self.device, self.run_dir.path / "profile"
            ) as self.profiler,
            ThreadPoolExecutor(1, "plan") as self.planner,
        ):
            if resumed is not None:
                self.progress.line(f"resumed from step {resumed} (epoch {position.epoch + 1}, batch {position.batch})")
            ranks = "" if self.world.size == 1 else f", {self.world.size} processes"
            self.progress.line(
                f"training {config.name}: {len(self.data.splits['train']):,} sequences, {parameters:,} parameters, "
                f"{self.total_steps:,} steps on {self.device.name}{ranks}"
            )
            self.task.train()
            while not self._finished():
                self._epoch()

    def _out_of_steps(self, ahead: int = 0) -> bool:
        return self.config.train.max_steps is not None and self.position.step + ahead >= self.config.train.max_steps

    def _finished(self) -> bool:
        train, position = self.config.train, self.position
        stopped_early = train.early_stop is not None and position.evaluations_without_gain >= train.early_stop
        return position.epoch >= train.epochs or stopped_early or self._out_of_steps()

    def _save_due(self, ahead: int = 0) -> bool:
        return _divides(self.config.train.checkpoint_every, self.position.step + ahead)

    def _delta_due(self, ahead: int = 0) -> bool:
        return _divides(self.config.train.delta_every, self.position.step + ahead)

    def _epoch(self) -> None:
        position, train = self.position, self.config.train
        batches = len(self.loader.batches(position.epoch))
        groups = _groups(self.loader.epoch(position.epoch, position.batch), train.accumulate)
        group, planned = next(groups, None), None
        while group is not None:
            prepared = self._prepare(group) if planned is None else planned.result()
            following = next(groups, None)
            planned = self._step(group, prepared, following)
            if self._delta_due():
                self._export_delta()
            if self._out_of_steps():
                break
            if self._save_due() and position.batch < batches:
                self._save()
            group = following
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
        if improved or not train.checkpoint_every or self._save_due() or self._finished():
            self._save()

    def _prepare(self, group: list[Batch]) -> list[Prepared]:
        """Draws and plans of a step: on the host where ids must be known there, else on the device."""
        device = torch.device("cpu") if self.plans_ahead else self.device.torch_device
        return [self.task.prepare(batch.to(device), self.position.epoch) for batch in group]

    def _step(
        self, group: list[Batch], prepared: list[Prepared], following: list[Batch] | None
    ) -> Future[list[Prepared]] | None:
        """One optimiser step. Returns the plan of the one that follows, where it is being made already."""
        position, train = self.position, self.config.train
        start = perf_counter()
        planned: list[Future[list[Prepared]]] = []

        def plan_next() -> None:
            # what tables count is read now: soon a plan may be changing it
            self.counters = {name: table.counters() for name, table in self.task.tables.tables.items()}
            # not across a checkpoint or a delta: it must not know of ids that no step has seen
            last = self._save_due(1) or self._delta_due(1) or self._out_of_steps(1)
            if self.plans_ahead and following is not None and not last:
                planned.append(self.planner.submit(self._prepare, following))

        lr = learning_rate(train, position.step, self.total_steps)
        result = self.stepper.gradients(prepared, lr, position.step + 1, plan_next)
        position.batch += len(group)
        position.step += 1
        if result.finite:
            self.optimizer.step()
            position.loss_sum += result.loss_sum
            position.weight_sum += result.weight_sum
        elif train.nan == "skip":
            position.skipped_steps += 1
            log.warning("step %d skipped: loss %s, gradient norm %s", position.step, result.loss_sum, result.norm)
        else:
            rates, clip = "train.lr", "train.clip_norm"
            if self.stepper.row_optimizers:
                rates, clip = "train.lr or embedding.lr", "train.clip_norm with train.clip: row"
            raise TrainingError(
                f"step {position.step} (epoch {position.epoch + 1}): loss {result.loss_sum}, gradient norm "
                f"{result.norm}. Lower {rates}, set {clip}, or set train.nan: skip; `--resume auto` goes on from the "
                "last checkpoint"
            )
        self.profiler.step()
        self.device.synchronize()
        seconds = perf_counter() - start
        position.train_seconds += seconds
        self._log_step(group, result, lr, seconds)
        return planned[0] if planned else None

    def _log_step(self, group: list[Batch], result: StepResult, lr: float, seconds: float) -> None:
        position = self.position
        lengths = [offsets_to_lengths(batch.offsets) for batch in group]
        part = 1.0 / self.sharing  # of its sequences that a rank works on
        work = [part * float(sum(x.sum() for x in lengths)), part * 3.0 * sum(self.task.flops(x) for x in lengths)]
        shares = self.world.all_gather((*work, seconds), f"work of step {position.step}")
        tokens, flops = sum(s[0] for s in shares), sum(s[1] for s in shares)
        values = {"loss": result.loss_sum / (result.weight_sum or 1.0), "lr": lr, "gradient_norm": result.norm}
        values |= {"tokens": tokens, "tokens_per_second": tokens / seconds, "mfu": flops / seconds / self.peak_flops}
        if self.world.size > 1:
            values["imbalance"] = imbalance([s[1] for s in shares])
        if position.step % self.config.train.log_every == 0:
            self.run_dir.log("train", position.step, position.epoch + 1, values | self._table_values())
        text = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  {values['mfu']:.1%} MFU"
        self.progress.step(position.step, position.epoch + 1, text)

    def _table_values(self) -> dict[str, float]:
        """What tables with slots count, summed over the ranks; `<table>/<what>`."""
        if not any(self.counters.values()):
            return {}
        own = self.counters if self.task.tables.replicas.is_first else {}  # replicas count the same
        everybody = [rank for rank in self.world.all_gather(own, "counters of the tables") if rank]
        values = {}
        for name, counters in self.counters.items():
            for what in counters:
                total = sum(rank[name][what] for rank in everybody)
                values[f"{name}/{what}"] = total / len(everybody) if what == "load_factor" else total
        return values

    def _validate(self) -> tuple[bool, str]:
        position, select = self.position, self.config.eval.select
        values = evaluate_split(self.task, self.data.splits["valid"], self.config, self.device)
        self.run_dir.log("valid", position.step, position.epoch + 1, values)
        value, known = values[select], position.best_value
        if math.isnan(value):
            log.warning("valid %s is not a number: are all labels alike?", select)
        gain = -1 if self.task.lower_is_better(select) else 1
        # a value that is not a number is kept only until there is one
        better = not math.isnan(value) and (known is None or gain * (value - known) > 0)
        improved = better or position.best_step is None
        if improved:
            position.best_value, position.best_step = None if math.isnan(value) else value, position.step
            position.evaluations_without_gain = 0
        else:
            position.evaluations_without_gain += 1
        best = improved and not math.isnan(value)
        return improved, f"valid {select} {value:.4f}{' (best)' if best else ''}"

    def _save(self) -> None:
        position = self.position
        self.saver.wait()
        position.metrics_bytes = self.run_dir.metrics_bytes
        parts: dict[str, Any] = {f"model.{name}": part for name, part in weight_parts(self.task).items()}
        parts |= {f"optimizer.{name}": part for name, part in optimizer_parts(self.task, self.optimizer).items()}
        parts["random.host"] = torch.get_rng_state()
        device_state = self.device.rng_state()
        if device_state is not None:
            parts["random.device"] = device_state
        snapshot = ckpt.checkpoint_snapshot(
            tensors=parts,
            keyed=keyed_rows(self.task),
            config=self.config,
            facts=self.data.facts,
            items=self.data.path / "items.arrow",
            state={
                "step": position.step,
                "position": asdict(position),
                "marked_step": self.marked_step if self.config.train.delta_every else None,
            },
        )
        if self.world.is_first:  # the newest still names the best before: it stays until this one is written
            ckpt.prune(
                self.run_dir.checkpoints, self.config.train.keep_checkpoints, position.best_step, self.best_written
            )
        self.saver.save(self.run_dir.checkpoints / f"step-{position.step}", snapshot)
        self.best_written = position.best_step

    def _export_delta(self) -> None:
        """The rows touched since the delta before, and all other weights."""
        step = self.position.step
        own = {f"{name}.weight" for name, _ in tables_of(self.task)}
        parts = {f"model.{name}": part for name, part in weight_parts(self.task).items() if name not in own}
        snapshot = ckpt.delta_snapshot(
            keyed=touched_rows(self.task), tensors=parts, mark_step=self.marked_step, step=step
        )
        self.saver.save(self.run_dir.path / "deltas" / f"step-{self.marked_step}-{step}", snapshot)
        self.marked_step = step

    def _test(self) -> Path:
        """Test the best epoch (holdout) or the last one (meta), once."""
        position = self.position
        step = position.step if position.best_step is None else position.best_step
        path = self.run_dir.checkpoints / f"step-{step}"
        if self.world.is_first:
            ckpt.prune(self.run_dir.checkpoints, self.config.train.keep_checkpoints, position.best_step)
        if step != position.step:
            load_weights(self.task, ckpt.open_checkpoint(path, self.world), str(path))
        lines = self.run_dir.first_decides(self.run_dir.metrics, "metrics so far")
        known = [line for line in lines if line["split"] == "valid" and line["step"] == step]
        if known:
            self.metrics["valid"] = {k: v for k, v in known[-1].items() if k not in ("step", "epoch", "split")}
        self.metrics["test"] = evaluate_split(self.task, self.data.splits["test"], self.config, self.device)
        epoch = known[-1]["epoch"] if known else position.epoch + bool(position.batch)
        self.run_dir.log("test", step, epoch, self.metrics["test"])
        return path


def _divides(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
