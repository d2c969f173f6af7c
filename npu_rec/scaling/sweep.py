"""Runs the points of a study in processes that share the cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from npu_rec.data import prepare
from npu_rec.errors import UserError
from npu_rec.scaling.point import RESULT, write_order
from npu_rec.scaling.results import Row, finished_rows, read_results, write_row
from npu_rec.scaling.study import Point, Study

Tell = Callable[[str], None]


def workers_for(threads: int, workers: int | None) -> int:
    """How many points run at once, so that workers x threads is at most the cores of this process.

    Raises:
        UserError: more are asked for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, cores // threads)
    if workers is not None and workers > most:
        raise UserError(f"--workers {workers}: with {threads} threads a point, {cores} cores are enough for {most}")
    return workers or most


def run_sweep(
    study: Study, out: Path, *, runs: Path | None = None, workers: int | None = None, tell: Tell = lambda line: None
) -> list[Row]:
    """Run the points that have no result yet; returns the rows of those that failed.

    Args:
        runs: where the run directories are, `out` by default.

    A point with a row in `<out>/results.jsonl` is finished; one that was interrupted goes on from its newest
    checkpoint. A point that fails is recorded, the others go on, and the next sweep tries it again.
    """
    results, runs = out / "results.jsonl", out if runs is None else runs
    done = {row["point"] for row in finished_rows(study, read_results(results))}
    waiting = deque(point for point in study.points if point.name not in done)
    for point in list(waiting):
        row = _left_behind(point, runs)
        if row is not None:  # it ended after the sweep had
            write_row(results, row)
            waiting.remove(point)
    count = workers_for(study.config.threads, workers)
    tell(f"{study.config.name}: {len(study.points) - len(waiting)} of {len(study.points)} points are finished")
    for section in {point.config.data.model_dump_json(): point.config.data for point in waiting}.values():
        prepare(section)  # once, not by every process
    running: dict[subprocess.Popen[bytes], tuple[Point, float]] = {}
    failed: list[Row] = []
    try:
        while waiting or running:
            while waiting and len(running) < count:
                point = waiting.popleft()
                running[_start(study, point, runs)] = point, time.perf_counter()
            for process in [p for p in running if p.poll() is not None]:
                point, start = running.pop(process)
                row = _left_behind(point, runs) or _failure(point, runs, process.returncode)
                write_row(results, row)
                if row["status"] == "failed":
                    failed.append(row)
                reason = f": {row['reason']}" if row["status"] == "failed" else ""
                seconds = time.perf_counter() - start
                tell(f"{point.name} {row['status']} after {seconds:.0f} s, {len(waiting) + len(running)} left{reason}")
            time.sleep(0.05)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def _start(study: Study, point: Point, runs: Path) -> subprocess.Popen[bytes]:
    folder = runs / point.name
    write_order(folder, point, study.config.entropy.model_dump())
    threads = {
        name: str(study.config.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", "from npu_rec.scaling.point import main; main()", str(folder)],
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **threads},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _left_behind(point: Point, runs: Path) -> Row | None:
    """The result in a run directory, if it is that of this configuration."""
    path = runs / point.name / RESULT
    if not path.is_file():
        return None
    row: Row = json.loads(path.read_text())
    return row if row["fingerprint"] == point.fingerprint else None


def _failure(point: Point, runs: Path, code: int) -> Row:
    lines = (runs / point.name / "log.txt").read_text(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"exit code {code}"
    return {
        "point": point.name,
        "fingerprint": point.fingerprint,
        "status": "failed",
        "settings": point.settings,
        "reason": reason.removeprefix("error: ") if code > 0 else f"ended by signal {-code}",
    }
