"""The folder of a run: configuration, environment, metrics, TensorBoard events, checkpoints, report."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from npu_rec.config import Config, dump_config
from npu_rec.errors import ConfigError


class RunDirectory:
    """`runs/<name>/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics_path = path / "metrics.jsonl"
        self.report_path = path / "report.html"
        self._tensorboard: SummaryWriter | None = None

    @property
    def used(self) -> bool:
        """Whether a run has left results here; one that failed before its first step has not."""
        measured = self.metrics_path.is_file() and self.metrics_path.stat().st_size > 0
        return measured or any(self.checkpoints.glob("step-*"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of this folder; the system releases the lock however this one ends.

        Raises:
            ConfigError: another process is training here.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"{self.path}: the run directory cannot be written: {error}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another process is training in this run directory") from None
            yield

    def start(self, config: Config, environment: dict[str, Any], *, metrics_bytes: int, step: int) -> None:
        """Create or take up the folder; metrics past `metrics_bytes` belong to steps that are run again."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(dump_config(config))
            (self.path / "environment.json").write_text(json.dumps(environment, indent=1))
            self.metrics_path.touch()
            os.truncate(self.metrics_path, min(metrics_bytes, self.metrics_path.stat().st_size))
        except OSError as error:
            raise ConfigError(f"{self.path}: the run directory cannot be written: {error}") from None
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, split: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and TensorBoard."""
        line = {"step": step, "epoch": epoch, "split": split, **values}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl; saved with a checkpoint."""
        return self.metrics_path.stat().st_size

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics_path.read_text().splitlines() if line.strip()]

    def close(self) -> None:
        """Flush the TensorBoard events."""
        if self._tensorboard is not None:
            self._tensorboard.close()
