"""Hooks of a cluster's recovery, and the adapter for TaskD with a stand-in for its package."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import FileStore

from npu_rec.distributed import recovery, watchdog
from npu_rec.distributed.recovery import EXIT_HUNG, Fault, RecoveryHook, add_hook
from npu_rec.distributed.watchdog import Watchdog
from npu_rec.errors import ConfigError, DistributedError

FAULT = Fault("hung", 0, 2, "sum", (1,), "rank 0 of 2: waited")

# The calls of MindCluster's page "TaskD Worker APIs", with their defaults and their results.
TASKD = """
calls = []

def init_taskd_worker(rank_id: int, upper_limit_of_disk_in_mb: int = 5000, framework: str = "pt") -> bool:
    calls.append(("init", rank_id, upper_limit_of_disk_in_mb, framework))
    return rank_id >= 0

def start_taskd_worker() -> bool:
    calls.append(("start",))
    return True

def destroy_taskd_worker() -> bool:
    calls.append(("destroy",))
    return True
"""


class Notes(RecoveryHook):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def started(self, rank: int, size: int) -> None:
        self.told.append((rank, size))

    def fault(self, fault: Fault) -> None:
        self.told.append(fault)

    def ended(self) -> None:
        self.told.append("ended")


class Broken(RecoveryHook):
    """Cannot hear of a fault."""

    def fault(self, fault: Fault) -> None:
        raise OSError("no route to the pager")


@pytest.fixture(autouse=True)
def no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_hooks", [])


def test_hooks_hear_of_start_fault_and_end(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    for hook in (RecoveryHook(), Broken(), notes):
        add_hook(hook)
    recovery.started(1, 4)
    with caplog.at_level(logging.WARNING):
        recovery.report(FAULT)
    recovery.ended()
    assert notes.told == [(1, 4), FAULT, "ended"]
    assert "recovery hook Broken failed: OSError: no route to the pager" in caplog.text


def test_a_failed_collective_is_a_fault(tmp_path: Path) -> None:
    notes = Notes()
    add_hook(notes)
    dog = Watchdog(0, 1, FileStore(str(tmp_path / "store"), 1), 60.0)
    try:
        with pytest.raises(DistributedError) as caught, dog.section("sum"):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:9")
    finally:
        dog.close()
    assert notes.told == [Fault("failed", 0, 1, "sum", (), str(caught.value))]


class Slow(RecoveryHook):
    """Takes longer than a fault allows, after writing what it was told."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fault(self, fault: Fault) -> None:
        self.path.write_text(f"{fault.kind} {fault.rank} {fault.operation} {fault.suspects}")
        time.sleep(60)


def hang(folder: Path) -> None:
    os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY), 2)
    watchdog._REPORT_SECONDS = 1.0
    add_hook(Slow(folder / "told"))
    with Watchdog(0, 2, FileStore(str(folder / "store"), 2), 0.5).section("sum"):
        time.sleep(60)


def test_a_slow_hook_does_not_keep_a_hung_process_alive(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=hang, args=(tmp_path,), daemon=True)
    process.start()
    try:
        process.join(30)
        assert process.exitcode == EXIT_HUNG
    finally:
        process.kill()
        process.join(10)
    assert (tmp_path / "told").read_text() == "hung 0 sum (1,)"
    assert "rank 1 has never reported" in (tmp_path / "stderr").read_text()


def adapter() -> None:
    """What `imports: [npu_rec.distributed.taskd]` does."""
    sys.modules.pop("npu_rec.distributed.taskd", None)
    importlib.import_module("npu_rec.distributed.taskd")


@pytest.fixture
def taskd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ascend's package is there."""
    package = tmp_path / "taskd" / "api"
    package.mkdir(parents=True)
    (package / "taskd_worker_api.py").write_text(TASKD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "taskd"]:
        del sys.modules[name]


@pytest.mark.usefixtures("taskd")
def test_taskd_watches_the_ranks() -> None:
    adapter()
    recovery.started(3, 8)
    recovery.ended()
    calls = importlib.import_module("taskd.api.taskd_worker_api").calls
    assert calls == [("init", 3, 5000, "pt"), ("start",), ("destroy",)]


@pytest.mark.usefixtures("taskd")
def test_taskd_that_does_not_start_is_an_error() -> None:
    adapter()
    with pytest.raises(ConfigError, match="TaskD's worker did not start"):
        recovery.started(-1, 8)


def test_taskd_that_is_not_installed_is_an_error() -> None:
    adapter()  # importing the adapter alone needs nothing
    with pytest.raises(ConfigError, match="TaskD cannot be imported"):
        recovery.started(0, 2)
