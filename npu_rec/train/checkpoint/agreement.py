"""Work that all ranks do at once and that succeeds or fails on all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from npu_rec.distributed import World
from npu_rec.errors import CheckpointError

T = TypeVar("T")
_ROUND = 5.0  # seconds between two signs of life of a rank at work, at most


@dataclass(frozen=True)
class _Done(Generic[T]):
    value: T | None = None
    error: str | None = None


def together(world: World, what: str, work: Callable[[], T]) -> list[T]:
    """What `work()` gave on every rank, by rank.

    Disks differ in speed, and a rank that waits inside a collective longer than the timeout counts as hung. So a
    thread goes through short rounds with the other ranks until all are done, while this one works.

    Raises:
        CheckpointError: the work failed on some rank: the same line on all ranks. An error of another kind, which is
            a mistake in the program, keeps its type on the rank where it arose.
    """
    if world.size == 1:
        return [work()]
    pause = _ROUND if world.watchdog is None else min(_ROUND, world.watchdog.timeout / 4)
    finished = threading.Event()
    mine: list[_Done[T]] = []
    all_done: list[_Done[T]] = []
    broken: list[Exception] = []

    def rounds() -> None:
        try:
            while True:
                said = world.all_gather(mine[0] if finished.wait(pause) else None, what)
                done = [one for one in said if one is not None]
                if len(done) == world.size:
                    all_done.extend(done)
                    return
        except Exception as error:  # a peer died, or the network did
            broken.append(error)

    thread = threading.Thread(target=rounds, name=what)
    thread.start()
    own_error: Exception | None = None
    try:
        mine.append(_Done(value=work()))
    except Exception as error:
        own_error = error
        text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        mine.append(_Done(error=text))
    except BaseException:
        mine.append(_Done(error="interrupted"))
        raise
    finally:
        finished.set()
        thread.join()
    if own_error is not None and not isinstance(own_error, CheckpointError):
        raise own_error
    if broken:
        raise broken[0]
    failures = [(rank, done.error) for rank, done in enumerate(all_done) if done.error is not None]
    if failures:
        ranks = ", ".join(str(rank) for rank, _ in failures)
        raise CheckpointError(f"{failures[0][1]} (on rank {ranks})") from own_error
    return [done.value for done in all_done]  # type: ignore[misc]
