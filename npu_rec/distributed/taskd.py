"""Puts the ranks under TaskD, the process monitor of Huawei's MindCluster: `imports: [npu_rec.distributed.taskd]`.

The package `taskd` is part of Ascend's training images; its calls are those of MindCluster's "TaskD Worker APIs".
"""

from __future__ import annotations

import importlib
from typing import Any

from npu_rec.distributed.recovery import RecoveryHook, add_hook
from npu_rec.errors import ConfigError

_PROFILING_MEGABYTES = 5000  # TaskD's own default: the disk that its profiles of all ranks may take


class TaskD(RecoveryHook):
    """A TaskD worker for the time in which ranks train together."""

    def started(self, rank: int, size: int) -> None:
        api = _api()
        if not (api.init_taskd_worker(rank, _PROFILING_MEGABYTES, "pt") and api.start_taskd_worker()):
            raise ConfigError(
                f"rank {rank}: TaskD's worker did not start, its own log says why; without MindCluster take "
                "npu_rec.distributed.taskd out of `imports:`"
            )

    def ended(self) -> None:
        _api().destroy_taskd_worker()


def _api() -> Any:
    try:
        return importlib.import_module("taskd.api.taskd_worker_api")
    except ImportError as error:
        raise ConfigError(
            f"`imports:` names npu_rec.distributed.taskd, but TaskD cannot be imported ({error}): use an image of "
            "MindCluster that has it, or take the import out"
        ) from error


add_hook(TaskD())
