"""The folder of a run: configuration, environment, metrics, TensorBoard events, checkpoints, report."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.tensorboard import SummaryWriter

from npu_rec.config import Config, dump_config
from npu_rec.distributed import World
from npu_rec.distributed.world import ALONE
from npu_rec.errors import ConfigError, StorageError, UserError

T = TypeVar("T")


def without_nan(document: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(document, dict):
        return {name: without_nan(value) for name, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [without_nan(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


class RunDirectory:
    """`runs/<name>/`."""

    def __init__(self, path: Path, world: World = ALONE) -> None:
        """Only the first rank of `world` writes here, but for its parts of checkpoints and tables."""
        self.path, self.world = path, world
        self.checkpoints = path / "checkpoints"
        self.metrics_path = path / "metrics.jsonl"
        self.report_path = path / "report.html"
        self._tensorboard: SummaryWriter | None = None

    @property
    def used(self) -> bool:
        """Whether a run has left results here; one that failed before its first step has not."""
        measured = self.metrics_path.is_file() and self.metrics_path.stat().st_size > 0
        return measured or any(self.checkpoints.glob("step-*"))

    def first_decides(self, decide: Callable[[], T], what: str) -> T:
        """What `decide` returns on the first rank, on all; what it raises there is raised on all."""
        result: T | None = None
        error: UserError | None = None
        if self.world.is_first:
            try:
                result = decide()
            except UserError as raised:
                error = raised
        result, error = self.world.broadcast((result, error), what)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of this folder; the system releases the lock however this one ends.

        Raises:
            ConfigError: another process is training here.
        """
        with ExitStack() as stack:
            self.first_decides(lambda: stack.enter_context(self._locked()), "run directory locked")
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
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
        self.first_decides(lambda: self._start(config, environment, metrics_bytes, step), "run directory started")

    def _start(self, config: Config, environment: dict[str, Any], metrics_bytes: int, step: int) -> None:
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
        if not self.world.is_first:
            return
        line = without_nan({"step": step, "epoch": epoch, "split": split, **values})
        try:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"{self.metrics_path}: cannot be written: {error}") from None
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl; saved with a checkpoint."""
        return self.metrics_path.stat().st_size if self.world.is_first else 0

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; what was not a number is NaN again."""
        lines = [json.loads(line) for line in self.metrics_path.read_text().splitlines() if line.strip()]
        return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]

    def close(self) -> None:
        """Flush the TensorBoard events."""
        if self._tensorboard is not None:
            self._tensorboard.close()
