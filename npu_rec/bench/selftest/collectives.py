"""Collectives between processes, one a card: values and bandwidth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from npu_rec.bench.selftest.check import Check, CheckFailed, CheckSkipped, Figures, guarded
from npu_rec.device import Device, device_report

MOST_PROCESSES = 8
CPU_PROCESSES = 2
TIMEOUT = 240.0  # seconds until hanging processes are killed; a first connection takes up to 140 s on Ascend
GRACE = 10.0  # seconds that the others have when a process has failed
NAMES = ("barrier", "broadcast", "all_reduce", "all_gather", "reduce_scatter", "all_to_all_single", "bandwidth")


def checks(device: Device, timeout: float = TIMEOUT) -> Iterator[Check]:
    """One check a collective."""
    results: dict[str, tuple[str, Figures] | str] = {}

    def start() -> tuple[str, Figures]:
        count = processes_for(device)
        results.update(_run(device, count, timeout))
        return f"{count} processes by {device.collective_backend}", {"processes": count}

    started = guarded("collectives", "processes start and end", start)
    yield started
    for name in NAMES if started.status == "passed" else ():
        yield guarded("collectives", name, partial(_outcome, results.get(name)))


def processes_for(device: Device) -> int:
    """As many as cards are visible, at most 8; on the CPU 2."""
    if device.is_cpu:
        return CPU_PROCESSES
    cards = int(device_report()["devices"][device.name]["count"])
    if cards < 2:
        raise CheckSkipped("one card is visible; collectives need two")
    return min(cards, MOST_PROCESSES)


def _outcome(result: tuple[str, Figures] | str | None) -> tuple[str, Figures]:
    if result is None:
        raise CheckFailed("no process told a result")
    if isinstance(result, str):
        raise CheckFailed(result)
    return result


def _run(device: Device, count: int, timeout: float) -> dict[str, tuple[str, Figures] | str]:
    """What the ranks wrote: by name a detail with figures, or what went wrong."""
    with tempfile.TemporaryDirectory(prefix="npu-rec-selftest-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "npu_rec.bench.selftest.collective_worker", device.name, name]
        running = []
        for rank in range(count):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            with (folder / f"{rank}.log").open("w") as log:
                running.append(subprocess.Popen(command, env={**os.environ, **world}, stdout=log, stderr=log))
        try:
            _wait(running, timeout)
            hung = [rank for rank, process in enumerate(running) if process.poll() is None]
        finally:
            for process in running:
                process.kill()
                process.wait()
        failed = [rank for rank, process in enumerate(running) if process.returncode and rank not in hung]
        if failed:
            raise CheckFailed(f"ranks {failed} of {count} failed{_last_line(folder, failed[0])}")
        if hung:
            raise CheckFailed(f"ranks {hung} of {count} had not ended after {timeout:g} s{_last_line(folder, hung[0])}")
        return _merged([json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)])


def _wait(running: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Until all have ended; not much longer than the first that failed, for the others wait for it in vain."""
    deadline = monotonic() + timeout
    while any(process.poll() is None for process in running) and monotonic() < deadline:
        if any(process.returncode for process in running):
            deadline = min(deadline, monotonic() + GRACE)
        sleep(0.05)


def _merged(ranks: list[dict[str, dict[str, object]]]) -> dict[str, tuple[str, Figures] | str]:
    """Rank 0's figures, unless a rank found something wrong."""
    merged: dict[str, tuple[str, Figures] | str] = {}
    for name, first in ranks[0].items():
        wrong = [f"rank {rank}: {result[name]['error']}" for rank, result in enumerate(ranks) if result[name]["error"]]
        merged[name] = "; ".join(wrong) or (str(first["detail"]), dict(first["figures"]))  # type: ignore[call-overload]
    return merged


def _last_line(folder: Path, rank: int) -> str:
    lines = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"; rank {rank} said: {lines[-1]}" if lines else ""
