"""Hung collectives and dead ranks: every waiting process ends in time, with a line that says whom it waited for."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore, TCPStore

from npu_rec.distributed.blame import blame
from npu_rec.distributed.heartbeat import Seen
from npu_rec.distributed.recovery import EXIT_HUNG
from npu_rec.distributed.sections import Clock, Entry, Sections
from npu_rec.distributed.watchdog import Watchdog
from npu_rec.errors import DistributedError

TIMEOUT = 2.0  # of the watchdog
ENDED_WITHIN = 5.0  # seconds from the start of the wait to the end of the process
STUCK = 40.0  # a process that lives so long was not ended by the watchdog
FAILED, RIGHT = 1, 0

processes = multiprocessing.get_context("forkserver")  # PyTorch is imported once, not by every rank
processes.set_forkserver_preload(["torch.distributed", "npu_rec.distributed"])


def add_up(watchdog: Watchdog, what: str) -> None:
    with watchdog.section(what, dist.group.WORLD):
        dist.all_reduce(torch.ones(1))


@contextmanager
def waits(watchdog: Watchdog, what: str) -> Iterator[None]:
    """A section whose start counts as the start of the wait; the others must know that this rank is in it."""
    Path(f"began-{watchdog.rank}").write_text(str(time.monotonic()))
    with watchdog.section(what, dist.group.WORLD):
        yield


def nap() -> None:
    time.sleep(STUCK)


def late(watchdog: Watchdog) -> None:
    if watchdog.rank == 1:
        nap()
    with waits(watchdog, "sum"):
        dist.all_reduce(torch.ones(1))


def stopped_inside(watchdog: Watchdog) -> None:
    with waits(watchdog, "sum"):
        if watchdog.rank == 1:
            time.sleep(TIMEOUT / 2)  # long enough for the others to learn that it is in the section
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))


def killed(watchdog: Watchdog) -> None:
    if watchdog.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    with waits(watchdog, "sum"):
        dist.all_reduce(torch.ones(1))


def killed_unnoticed(watchdog: Watchdog) -> None:
    """As on a card: a collective there does not see that a process has died."""
    if watchdog.rank == 1:
        time.sleep(TIMEOUT / 4)  # its warm-up is known
        os.kill(os.getpid(), signal.SIGKILL)
    with waits(watchdog, "sum"):
        nap()


def store_killed(watchdog: Watchdog) -> None:
    with waits(watchdog, "sum"):
        if watchdog.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        nap()


def store_stopped(watchdog: Watchdog) -> None:
    with waits(watchdog, "sum"):
        if watchdog.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        nap()


def left_early(watchdog: Watchdog) -> None:
    if watchdog.rank == 1:
        watchdog.close()
        os._exit(RIGHT)
    with waits(watchdog, "sum"):
        nap()


def on_the_device(watchdog: Watchdog) -> None:
    """The host is past the collective when the card hangs in it."""
    if watchdog.rank == 1:
        nap()
    with waits(watchdog, "sum"):
        pass
    nap()


def long_and_right(watchdog: Watchdog) -> None:
    """Twice the timeout: in a section with progress, in none, and in another thread with a group of its own."""
    twin = dist.new_group()

    def prefetch() -> None:
        for _ in range(8):
            with watchdog.section("ids", twin):
                time.sleep(TIMEOUT / 4 * watchdog.rank)  # the other rank waits that long
                dist.all_reduce(torch.ones(1), group=twin)

    thread = threading.Thread(target=prefetch)
    thread.start()
    with watchdog.section("backward", dist.group.WORLD):
        for _ in range(4):
            time.sleep(TIMEOUT / 4)
            add_up(watchdog, "gradients")
    time.sleep(TIMEOUT * 1.1)
    thread.join()


class Never:
    """A mark that the device does not come to."""

    def query(self) -> bool:
        return False


@dataclass
class Ended:
    """How one rank ended: exit code (None: it had to be killed), standard error, seconds from its wait to its end."""

    code: int | None
    error: str
    seconds: float


def rank_main(rank: int, size: int, port: int, folder: Path, scenario: Callable[[Watchdog], None]) -> None:
    os.chdir(folder)
    errors = os.open(f"stderr-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    torch.set_num_threads(1)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    place = f"tcp://127.0.0.1:{port}" if port else f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    store = dist.distributed_c10d._get_default_store()
    record = Never if scenario is on_the_device else None
    watchdog = Watchdog(rank, size, store, TIMEOUT, record=record)
    try:
        for _ in range(3):
            if record is None:
                add_up(watchdog, "warm-up")
        scenario(watchdog)
        watchdog.close()
        dist.destroy_process_group()
    except DistributedError as error:
        os.write(2, f"failed: {error}\n".encode())
        os._exit(FAILED)


def play(scenario: Callable[[Watchdog], None], folder: Path, *, size: int = 2, tcp: bool = False) -> list[Ended]:
    """Run the scenario on `size` ranks until those that do not stop themselves have ended."""
    port = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False).port if tcp else 0
    ranks = [
        processes.Process(target=rank_main, args=(rank, size, port, folder, scenario), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    ends: dict[int, float] = {}
    stopped = 1 if scenario in (stopped_inside, store_stopped) else 0
    limit = time.monotonic() + STUCK - 5
    try:
        while len(ends) < size - stopped and time.monotonic() < limit:
            wait([rank.sentinel for n, rank in enumerate(ranks) if n not in ends], timeout=1.0)
            for number, rank in enumerate(ranks):
                if number not in ends and rank.exitcode is not None:
                    ends[number] = time.monotonic()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)
    results = []
    for number, rank in enumerate(ranks):
        began = folder / f"began-{number}"
        seconds = ends.get(number, limit) - (float(began.read_text()) if began.exists() else limit)
        code = rank.exitcode if number in ends else None
        results.append(Ended(code, (folder / f"stderr-{number}").read_text(), seconds))
    return results


def assert_hung(ended: Ended, *parts: str) -> None:
    assert ended.code == EXIT_HUNG, ended.error
    line = next(line for line in ended.error.splitlines() if line.startswith("failed: "))
    for part in parts:
        assert part in line
    assert TIMEOUT <= ended.seconds <= ENDED_WITHIN


def test_a_late_rank_is_named_and_shows_where_it_is(tmp_path: Path) -> None:
    first, second, third = play(late, tmp_path, size=3)
    for rank, ended in ((0, first), (2, third)):
        assert_hung(ended, f"rank {rank} of 3", "'sum'", "rank 1 is outside any collective, after 'warm-up'")
        assert "dist.all_reduce" in ended.error  # the stack
    assert "in 'sum': rank 1 is" in first.error
    assert second.code == EXIT_HUNG
    assert "rank 1 of 3: ends because another rank did, they wait for this rank" in second.error
    assert "in nap" in second.error


def test_a_rank_that_stops_inside_a_collective(tmp_path: Path) -> None:
    waiting, stopped = play(stopped_inside, tmp_path)
    assert_hung(waiting, "rank 0 of 2", "'sum'", "rank 1 has given no sign of life for at least", "last seen in 'sum'")
    assert stopped.code is None


def test_a_killed_rank_is_an_error_of_the_collective(tmp_path: Path) -> None:
    waiting, dead = play(killed, tmp_path)
    assert dead.code == -signal.SIGKILL
    assert waiting.code == FAILED
    assert "failed: rank 0 of 2: a collective failed in 'sum': " in waiting.error
    assert "another rank has died" in waiting.error
    assert waiting.seconds < TIMEOUT


def test_a_killed_rank_that_the_backend_does_not_notice(tmp_path: Path) -> None:
    waiting, dead = play(killed_unnoticed, tmp_path)
    assert dead.code == -signal.SIGKILL
    assert_hung(waiting, "'sum'", "rank 1 has given no sign of life", "last seen after 'warm-up'")


@pytest.mark.parametrize(("scenario", "how"), [(store_killed, "has failed ("), (store_stopped, "has not answered for")])
def test_the_host_of_the_store_is_gone(tmp_path: Path, scenario: Callable[[Watchdog], None], how: str) -> None:
    host, waiting = play(scenario, tmp_path, tcp=True)
    assert host.code == (-signal.SIGKILL if scenario is store_killed else None)
    assert_hung(waiting, "rank 1 of 2", "'sum'", how, "its host, rank 0, has died or stopped")


def test_a_rank_that_has_ended(tmp_path: Path) -> None:
    waiting, gone = play(left_early, tmp_path)
    assert gone.code == RIGHT
    assert_hung(waiting, "rank 0 of 2", "rank 1 has ended its run, after 'warm-up'")


def test_a_card_that_hangs_behind_the_host(tmp_path: Path) -> None:
    waiting, _ = play(on_the_device, tmp_path)
    assert_hung(waiting, "rank 0 of 2", "in 'sum': rank 1 is outside any collective, before the first")


def test_no_false_alarm(tmp_path: Path) -> None:
    assert [(ended.code, ended.error) for ended in play(long_and_right, tmp_path)] == [(RIGHT, "")] * 2


def test_errors_of_the_model_stay_what_they_are(tmp_path: Path) -> None:
    watchdog = Watchdog(0, 1, FileStore(str(tmp_path / "store"), 1), TIMEOUT)
    try:
        with pytest.raises(RuntimeError, match="mat1 and mat2"), watchdog.section("backward"):
            torch.ones(2, 3) @ torch.ones(2, 3)
        with (
            pytest.raises(DistributedError, match=r"rank 0 of 1: a collective failed in 'sum': .*peer"),
            watchdog.section("backward"),
            watchdog.section("sum"),
        ):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:9")
    finally:
        watchdog.close()


def alone_in_a_large_world(rank: int, folder: Path) -> None:
    os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY), 2)
    with Watchdog(rank, 20, FileStore(str(folder / "store"), 20), 1.0).section("sum"):
        nap()


@pytest.mark.parametrize(("rank", "waits_for"), [(7, 1.0), (8, 1.8)])
def test_later_ranks_leave_the_verdict_to_the_first(tmp_path: Path, rank: int, waits_for: float) -> None:
    process = processes.Process(target=alone_in_a_large_world, args=(rank, tmp_path), daemon=True)
    process.start()
    try:
        process.join(STUCK)
        assert process.exitcode == EXIT_HUNG
    finally:
        process.kill()
        process.join(10)
    (waited,) = re.findall(r"failed: rank \d of 20: waited ([\d.]+) s in 'sum'", (tmp_path / "stderr").read_text())
    assert waits_for <= float(waited) < waits_for + 0.7


class Mark:
    """A mark in a device's queue that the test moves past."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


def test_work_on_a_device_is_watched_until_it_is_done() -> None:
    marks: list[Mark] = []

    def record() -> Mark:
        marks.append(Mark())
        return marks[-1]

    sections = Sections(Clock(1.0), record)
    for what in ("a", "b"):
        sections.leave(sections.enter(what, None))
    assert [entry.what for entry, _ in sections.waiting()] == ["a"]
    assert sections.snapshot()[""]["open"] == [[1, "a"], [2, "b"]]
    marks[0].passed = True
    sections.settle()
    assert [entry.what for entry, _ in sections.waiting()] == ["b"]
    marks[1].passed = True
    sections.settle()
    assert sections.waiting() == []


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("npu_rec.distributed.sections.monotonic", lambda: now)
    clock = Clock(0.5)
    now += 0.5
    assert clock.now() == 0.5
    clock.tick()
    now += 3600.0
    assert clock.now() == 2.0  # half a second and a late tick, not an hour
    clock.tick()
    assert clock.now() == 2.0


def seen(entered: int, open_: list[tuple[int, str]], *, changed: float = 100.0, ended: bool = False) -> Seen:
    group = {"entered": entered, "open": [list(pair) for pair in open_], "last": "rows", "quiet": 7.0}
    return Seen({"beat": 9, "ended": ended, "groups": {"": group}}, changed)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "rank 1 has never reported"),
        (seen(5, [(5, "sum")]), None),
        (seen(6, [(5, "sum"), (6, "inner")]), None),
        (seen(5, [(5, "sum")], changed=90.0), "no sign of life for at least 10.0 s and was last seen in 'sum'"),
        (seen(4, []), "rank 1 is outside any collective, after 'rows', for 7.0 s"),
        (seen(4, [(4, "ids")]), "rank 1 is still in 'ids' for 7.0 s"),
        (seen(7, [(7, "ids")]), "rank 1 is past it, in 'ids'"),
        (seen(5, [(5, "ids")]), "rank 1 is in 'ids' instead: ranks run different collectives"),
        (seen(4, [], ended=True), "rank 1 has ended its run, after 'rows'"),
    ],
)
def test_blame(state: Seen | None, reason: str | None) -> None:
    entry = Entry(None, 5, "sum", 0)
    known = {2: seen(5, [(5, "sum")])} | ({} if state is None else {1: state})
    suspects, text = blame(entry, [1, 2], known, now=100.0, patience=4.0)
    assert suspects == ([] if reason is None else [1])
    assert (reason or "all ranks of its group are in it") in text


def test_blame_of_many_is_short() -> None:
    suspects, text = blame(Entry(None, 5, "sum", 0), range(1, 1000), {}, now=0.0, patience=4.0)
    assert len(suspects) == 999
    assert text.endswith("rank 8 has never reported, and 991 more ranks")
