"""Several processes of a test, a rank each."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

processes = multiprocessing.get_context("forkserver")  # PyTorch is imported once, not by every rank
processes.set_forkserver_preload(["hypothesis", "npu_rec.train", "torch._dynamo"])


def on_ranks(count: int, target: Callable[..., None], *arguments: object, seconds: float = 120.0) -> None:
    """`target(rank, *arguments)` in `count` processes, at most `seconds` in all; a failing rank fails the test."""
    running = [processes.Process(target=target, args=(rank, *arguments)) for rank in range(count)]
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
