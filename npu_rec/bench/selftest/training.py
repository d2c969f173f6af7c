"""A short training run against the same run on the CPU, and its checkpoint taken over by the CPU."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from npu_rec.bench.selftest.check import Check, CheckFailed, CheckSkipped, Figures, guarded
from npu_rec.device import Device
from npu_rec.train import TrainResult, evaluate, load_run_config, train

STEPS, MORE_STEPS = 20, 4
LOSS_LIMIT = 1e-3  # relative; `auto` takes other backends on an accelerator, and AdamW carries their differences on
BF16_LIMIT = 0.05  # 8 bits of mantissa
METRIC_LIMIT = 0.02  # of 1: near ties may change places between devices
SETTINGS = (
    "name=selftest", "data.name=synthetic",
    "data.options={users: 400, length: 30, items: 300, categories: 20}",
    "model.max_seq_len=24", "model.embedding_dim=32", "model.num_blocks=2", "model.num_heads=2",
    "model.attention_dim=16", "model.linear_dim=16",
    "task.options={num_negatives: 16}", "eval.protocol=meta", "eval.remove=none", "eval.every=99",
    "eval.metrics=[hr@10, ndcg@10]",
    "train.batch_size=32", "train.epochs=9", "train.log_every=1", "train.seed=7",
)  # fmt: skip


def checks(device: Device) -> Iterator[Check]:
    """Loss curves, a checkpoint that changes devices, bfloat16."""
    with tempfile.TemporaryDirectory(prefix="npu-rec-selftest-") as folder:
        runs = _Runs(Path(folder), device)
        for name, check in (
            (f"loss curve of {STEPS} steps, as on the CPU", runs.loss_curve),
            ("checkpoint goes on on the CPU", runs.continued),
            ("checkpoint evaluated on the CPU", runs.evaluated),
            (f"loss curve of {STEPS} steps in bfloat16", runs.bf16),
        ):
            yield guarded("training", name, check)


class _Runs:
    def __init__(self, folder: Path, device: Device) -> None:
        self.folder, self.device = folder, device
        self.result: TrainResult | None = None  # of the run on the device

    def loss_curve(self) -> tuple[str, Figures]:
        """Steps 1..20 on both."""
        self._train("cpu", "cpu", STEPS + MORE_STEPS)
        self.result = self._train("device", self.device.name, STEPS)
        return self._compare("device", 0, STEPS, LOSS_LIMIT)

    def continued(self) -> tuple[str, Figures]:
        """The device's last checkpoint, some steps more on the CPU."""
        self._finished()
        resumed = self._train("device", "cpu", STEPS + MORE_STEPS, resume="auto").resumed_from_step
        if resumed != STEPS:
            raise CheckFailed(f"resumed from step {resumed}, not {STEPS}")
        return self._compare("device", STEPS, STEPS + MORE_STEPS, LOSS_LIMIT)

    def evaluated(self) -> tuple[str, Figures]:
        """The metrics that the device found, found by the CPU."""
        result = self._finished()
        config = load_run_config("configs/base.yaml", self._settings("cpu", STEPS))
        on_cpu, ours = evaluate(config, result.checkpoint).metrics["test"], result.metrics["test"]
        figures = {f"{name} {place}": m[name] for name in ours for place, m in (("device", ours), ("cpu", on_cpu))}
        worst = max(abs(ours[name] - on_cpu[name]) for name in ours)
        text = ", ".join(f"{name} {ours[name]:.4f} and {on_cpu[name]:.4f} on the CPU" for name in ours)
        if not worst <= METRIC_LIMIT:
            raise CheckFailed(f"{text}: more than {METRIC_LIMIT} apart", figures)
        return text, figures

    def bf16(self) -> tuple[str, Figures]:
        """Autocast on the device against float32 on the CPU."""
        self._train("bf16", self.device.name, STEPS, "train.precision=bf16")
        return self._compare("bf16", 0, STEPS, BF16_LIMIT)

    def _finished(self) -> TrainResult:
        if self.result is None:
            raise CheckSkipped("the run on the device did not finish")
        return self.result

    def _settings(self, backend: str, steps: int) -> list[str]:
        prepared = f"data.dir={json.dumps(str(self.folder / 'data'))}"
        return [*SETTINGS, prepared, f"device.backend={backend}", f"train.max_steps={steps}"]

    def _train(self, run: str, backend: str, steps: int, *more: str, resume: str | None = None) -> TrainResult:
        config = load_run_config("configs/base.yaml", [*self._settings(backend, steps), *more])
        with contextlib.redirect_stderr(io.StringIO()):  # progress of the run; stderr has a line a check
            return train(config, run_dir=self.folder / run, resume=resume)

    def _losses(self, run: str) -> list[float]:
        """Of the optimiser steps."""
        lines = map(json.loads, (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [line["loss"] for line in lines if "lr" in line]

    def _compare(self, run: str, start: int, stop: int, limit: float) -> tuple[str, Figures]:
        ours, on_cpu = (self._losses(name)[start:stop] for name in (run, "cpu"))
        if len(ours) != len(on_cpu) or len(ours) != stop - start:
            raise CheckFailed(f"{len(ours)} losses, {len(on_cpu)} on the CPU, expected {stop - start}")
        apart = [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(ours, on_cpu, strict=True)]
        worst = max(apart)
        figures = {
            "worst_relative_difference": worst, "first_loss": ours[0], "last_loss": ours[-1],
            "last_loss_cpu": on_cpu[-1],
        }  # fmt: skip
        text = f"loss {ours[0]:.4f} to {ours[-1]:.4f} in steps {start + 1} to {stop}, {on_cpu[-1]:.4f} on the CPU; "
        text += f"worst difference {worst:.1e} (step {start + 1 + apart.index(worst)})"
        if not worst <= limit:
            raise CheckFailed(f"{text}, more than {limit:g}", figures)
        return text, figures
