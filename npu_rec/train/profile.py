"""A torch.profiler trace of some training steps."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from npu_rec.device import Device

WARM_UP = 3


class StepProfiler:
    """Records `steps` optimiser steps after three warm-up steps into `folder/trace.json`; 0 records nothing."""

    def __init__(self, steps: int, device: Device, folder: Path) -> None:
        self._profiler: torch.profiler.profile | None = None
        if steps:
            folder.mkdir(parents=True, exist_ok=True)
            self._profiler = torch.profiler.profile(
                activities=device.profiler_activities(),
                schedule=torch.profiler.schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1),
                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(folder / "trace.json")),
            )

    def __enter__(self) -> StepProfiler:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def step(self) -> None:
        """After an optimiser step."""
        if self._profiler is not None:
            self._profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.stop()
