"""Runs the points of a study in processes that share the cores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from npu_rec.data import prepare
from npu_rec.device import card_count
from npu_rec.errors import DataError, UserError
from npu_rec.scaling.fits import needs_scipy
from npu_rec.scaling.point import ORDER, RESULT, write_order
from npu_rec.scaling.results import Row, finished_rows, read_results, write_row
from npu_rec.scaling.study import Point, Study
from npu_rec.train.run_dir import RunDirectory

Tell = Callable[[str], None]


def workers_for(threads: int, workers: int | None, cards: int | None = None) -> int:
    """How many points run at once: workers x threads is at most the cores of this process, and each has its own card.

    Args:
        cards: None on the CPU.

    Raises:
        UserError: more are asked for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most, room = max(1, cores // threads), f"with {threads} threads a point, {cores} cores are"
    if cards is not None and cards < most:
        most, room = cards, f"{cards} card(s) are"
    if workers is not None and workers > most:
        raise UserError(f"--workers {workers}: {room} enough for {most}")
    return workers or most


def run_sweep(
    study: Study, out: Path, *, runs: Path | None = None, workers: int | None = None, tell: Tell = lambda line: None
) -> list[Row]:
    """Run the points that have no result yet; returns the rows of those that failed.

    Args:
        runs: where the run directories are, `out` by default.

    A point with a row in `<out>/results.jsonl` is finished; one that was interrupted goes on from its newest
    checkpoint. A point that fails is recorded, the others go on, and the next sweep tries it again. A run directory
    of an earlier configuration is renamed.

    Raises:
        UserError: a run directory holds a run of something else, or scipy, which the fits need, is not installed.
    """
    needs_scipy()
    results, runs = out / "results.jsonl", out if runs is None else runs
    done = {row["point"] for row in finished_rows(study, read_results(results))}
    waiting = deque(point for point in study.points if point.name not in done)
    for point in list(waiting):
        row = _left_behind(point, runs)
        if row is not None:  # it ended after the sweep had
            write_row(results, row)
            waiting.remove(point)
    for point in waiting:
        _clear(point, runs, tell)
    cards = card_count(study.points[0].config.device.backend)
    slots = list(range(workers_for(study.config.threads, workers, cards)))
    tell(f"{study.config.name}: {len(study.points) - len(waiting)} of {len(study.points)} points are finished")
    for section in {point.config.data.model_dump_json(): point.config.data for point in waiting}.values():
        try:
            prepare(section)  # once, not by every process
        except DataError as error:  # its points fail with it
            tell(str(error))
    running: dict[subprocess.Popen[bytes], tuple[Point, float, int]] = {}
    failed: list[Row] = []
    try:
        while waiting or running:
            while waiting and slots:
                point, slot = waiting.popleft(), slots.pop(0)
                card = None if cards is None else slot
                running[_start(study, point, runs, card)] = point, time.perf_counter(), slot
            for process in [p for p in running if p.poll() is not None]:
                point, start, slot = running.pop(process)
                slots.append(slot)
                row = _left_behind(point, runs) or _failure(point, runs, process.returncode)
                write_row(results, row)
                if row["status"] == "failed":
                    failed.append(row)
                reason = f": {row['reason']}" if row["status"] == "failed" else ""
                seconds = time.perf_counter() - start
                tell(f"{point.name} {row['status']} after {seconds:.0f} s, {len(waiting) + len(running)} left{reason}")
            time.sleep(0.05)
    finally:
        if running:  # it was ended itself
            tell(f"ended with {len(waiting) + len(running)} points left; the same command goes on with them")
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def _clear(point: Point, runs: Path, tell: Tell) -> None:
    """Make room where the run directory of a point is used by an earlier configuration of it."""
    folder, order = runs / point.name, runs / point.name / ORDER
    if not RunDirectory(folder).used:
        return
    if not order.is_file():
        raise UserError(f"{folder}: holds a run that is no point of a study; choose another --out or --run-dir")
    before = json.loads(order.read_text())["fingerprint"]
    if before != point.fingerprint:
        kept = runs / f"{point.name}.{before}"
        if kept.exists():
            shutil.rmtree(folder)  # the same run is kept already
        else:
            folder.rename(kept)
        tell(f"{point.name}: its configuration has changed; the earlier run is in {kept}")


def _start(study: Study, point: Point, runs: Path, card: int | None) -> subprocess.Popen[bytes]:
    folder = runs / point.name
    write_order(folder, point, study.config.entropy.model_dump())
    threads = {
        name: str(study.config.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    if card is not None:
        threads["LOCAL_RANK"] = str(card)  # which picks the card of a process
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
