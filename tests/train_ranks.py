"""Trainings one after the other on each of several ranks, for tests that compare what they logged.

As a program, one rank: RANK, WORLD_SIZE and MASTER_PORT are set, and the trainings stand in `jobs.json` beside
MEETING_POINT.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from npu_rec.train import load_run_config, train, trainer

processes = multiprocessing.get_context("forkserver")  # PyTorch is imported once, not by every rank
processes.set_forkserver_preload(["npu_rec.train", "torch._dynamo"])


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        config: a YAML file.
        folder: the run directory; `error-<rank>` in it is the traceback of a rank that failed.
        options: `a.b=value`, over those of the file.
    """

    config: str
    folder: str
    options: tuple[str, ...]
    resume: str | None = None


def run_jobs(jobs: Sequence[Job]) -> None:
    """On this rank; a failing one does not keep the rest from running.

    Without the drawing of reports and the timing of the processor, which take longer than these trainings.
    """
    with patch.object(trainer, "write_report"), patch.object(trainer, "matmul_flops", return_value=1e12):
        for job in jobs:
            try:
                train(load_run_config(job.config, list(job.options)), run_dir=job.folder, resume=job.resume)
            except Exception:
                Path(job.folder).mkdir(parents=True, exist_ok=True)
                (Path(job.folder) / f"error-{os.environ.get('RANK', '0')}").write_text(traceback.format_exc())


@contextmanager
def meeting_place() -> Iterator[dict[str, str]]:
    """Variables by which the ranks of any number of trainings find each other: a store that this process keeps."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    del store


def train_on_ranks(count: int, jobs: Sequence[Job], *, seconds: float = 240.0) -> None:
    """Run `jobs` on `count` gloo processes, at most `seconds` in all."""
    with meeting_place() as place:
        running = [processes.Process(target=_rank, args=(place, rank, count, jobs)) for rank in range(count)]
        for process in running:
            process.start()
        try:
            end = time.monotonic() + seconds
            for process in running:
                process.join(max(0.0, end - time.monotonic()))
            assert [process.exitcode for process in running] == [0] * count  # None: it took too long
        finally:
            for process in running:
                process.kill()
                process.join()


def _rank(place: dict[str, str], rank: int, count: int, jobs: Sequence[Job]) -> None:
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    run_jobs(jobs)


def wide_shop(folder: Path) -> Path:
    """The configuration of a shop with many more items, 400, than a step of a small batch reads."""
    from conftest import SHOP, write_shop  # not where this file is the program

    source = write_shop(folder / "source", items=400)
    config = folder / "wide.yaml"
    config.write_text(SHOP.format(source=source, prepared=folder / "prepared"))
    return config


def write_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    """For `main`."""
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))


def main() -> None:
    jobs = json.loads((Path(os.environ["MEETING_POINT"]).parent / "jobs.json").read_text())
    run_jobs([Job(**job) for job in jobs])


def logged(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: optimiser steps, or evaluations of another split."""
    errors = "\n\n".join(f"{path}:\n{path.read_text()}" for path in sorted(folder.glob("error-*")))
    assert not errors, errors
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split and (split != "train" or "lr" in line)]


def column(folder: Path, name: str) -> list[float]:
    """`loss` or another value of every optimiser step."""
    return [line[name] for line in logged(folder)]


def worst(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    main()
