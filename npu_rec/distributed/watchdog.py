"""Ends a process whose collective hangs, with a line that names the rank, the operation and who is missing.

It does not rely on the timeouts of gloo, nccl or hccl: a thread watches how long this process has been in a section,
looks at what the other ranks say of themselves, and ends the process, since a hung collective cannot be interrupted.
The rank that ends first tells the others, so that all of them end and each prints where it stands.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from npu_rec.distributed import recovery
from npu_rec.distributed.blame import blame
from npu_rec.distributed.heartbeat import Heartbeat, Verdict
from npu_rec.distributed.recovery import EXIT_HUNG, Fault
from npu_rec.distributed.sections import Clock, Entry, Event, Sections, group_ranks
from npu_rec.errors import DistributedError

_JUDGES = 8  # ranks of a group that look at the others; thousands that do would stall the store
_REPORT_SECONDS = 30.0  # for the message and the hooks; the process ends even if stderr or a hook blocks


class Watchdog:
    """Watches the sections of this process; after `timeout` seconds in one it says who is missing, and exits.

    Args:
        rank, size: this process among all.
        store: through which all ranks find each other; the watchdog opens a connection of its own.
        timeout: seconds without entering or leaving a section while in one.
        record: marks the device's queue where collectives return before they are done (`event_recorder`).
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        timeout: float,
        *,
        record: Callable[[], Event] | None = None,
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._interval = min(timeout / 10, 5.0)
        self._patience = 4 * self._interval  # that many signs of life must be missing
        self._clock = Clock(self._interval)
        self._sections = Sections(self._clock, record)
        self._heartbeat = Heartbeat(rank, store, self._interval, self._clock, self._sections)
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._judge, name="watchdog", daemon=True)]
        if record is not None:
            self._threads.append(threading.Thread(target=self._settle, name="watchdog device", daemon=True))
        for thread in self._threads:
            thread.start()

    @contextmanager
    def section(self, what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
        """A stretch of work in which the ranks of a group (None: all) wait for each other; sections may nest.

        Raises:
            DistributedError: a collective in it has failed because of another rank or the network.
        """
        entry = self._sections.enter(what, group)
        try:
            yield
        except BaseException as error:
            self._sections.leave(entry, failed=True)
            if isinstance(error, RuntimeError) and _of_network(error):
                raise self._failed(what, error) from error
            raise
        self._sections.leave(entry)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._heartbeat.close()
        for thread in self._threads:
            thread.join(1.0)

    def _failed(self, what: str, error: RuntimeError) -> DistributedError:
        first = str(error).strip().splitlines()[0]
        message = (
            f"rank {self.rank} of {self.size}: a collective failed in {what!r}: {first}; another rank has died (see "
            "its log) or the network is down: `--resume auto` goes on from the last checkpoint"
        )
        recovery.report(Fault("failed", self.rank, self.size, what, (), message))
        return DistributedError(message)

    def _settle(self) -> None:
        while not self._closed.wait(self._interval):
            self._sections.settle()

    def _judge(self) -> None:
        """Never touches the store, a device or a lock that is held while doing so: it must always come to a verdict."""
        observe = self.timeout - 2 * self._patience  # from then on the states of others are read
        while not self._closed.wait(self._interval):
            self._clock.tick()
            if self._heartbeat.verdict is not None:
                self._follow(self._heartbeat.verdict)
            waiting = [(entry, seconds - self._grace(entry)) for entry, seconds in self._sections.waiting()]
            late = [entry.group for entry, seconds in waiting if seconds >= observe]
            self._heartbeat.watched = {rank for group in late for rank in group_ranks(group, self.size)} - {self.rank}
            overdue = max(waiting, key=lambda pair: pair[1], default=None)
            if overdue is not None and overdue[1] >= self.timeout:
                self._give_up(overdue[0], overdue[1] + self._grace(overdue[0]))

    def _grace(self, entry: Entry) -> float:
        """Seconds for which this rank leaves the verdict to the first ranks of the group."""
        place = group_ranks(entry.group, self.size).index(self.rank)
        return 0.0 if place < _JUDGES else 2 * self._patience

    def _give_up(self, entry: Entry, seconds: float) -> None:
        others = [rank for rank in group_ranks(entry.group, self.size) if rank != self.rank]
        suspects, because = self._lost_store() or blame(
            entry, others, self._heartbeat.seen, self._clock.now(), self._patience
        )
        message = (
            f"rank {self.rank} of {self.size}: waited {seconds:.1f} s in {entry.what!r}: {because}. "
            f"Exit code {EXIT_HUNG}; if that wait was right, raise parallel.timeout ({self.timeout:g} s)"
        )
        self._heartbeat.announce(Verdict(self.rank, message, suspects))
        self._end(Fault("hung", self.rank, self.size, entry.what, tuple(suspects), message), entry.thread)

    def _lost_store(self) -> tuple[list[int], str] | None:
        """Nothing is known of the others when the store is gone, except that its host is."""
        silent = self._clock.now() - self._heartbeat.answered
        if self._heartbeat.error is None and silent < self._patience:
            return None
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        suspects, host = ([], "torchrun on the first node") if by_agent else ([0], "rank 0")
        error = self._heartbeat.error
        how = f"has not answered for {silent:.1f} s" if error is None else f"has failed ({error})"
        return suspects, f"the store by which ranks find each other {how}: its host, {host}, has died or stopped"

    def _follow(self, verdict: Verdict) -> None:
        role = "they wait for this rank" if self.rank in verdict.suspects else "this rank follows"
        message = f"rank {self.rank} of {self.size}: ends because another rank did, {role}: [{verdict.message}]"
        main = threading.main_thread().ident or 0
        self._end(Fault("hung", self.rank, self.size, None, tuple(verdict.suspects), message), main)

    def _end(self, fault: Fault, thread: int) -> None:
        begun = time.monotonic()
        reporter = threading.Thread(target=_report, args=(fault, thread), daemon=True)
        reporter.start()
        reporter.join(_REPORT_SECONDS)
        # The others must read the verdict before connections to this process break.
        time.sleep(max(0.0, 3 * self._interval - (time.monotonic() - begun)))
        os._exit(EXIT_HUNG)


def _report(fault: Fault, thread: int) -> None:
    """The line and the stacks, straight to the standard error: a progress bar may hold sys.stderr."""
    frames, main = sys._current_frames(), threading.main_thread().ident or 0
    text = [f"failed: {fault.message}\n"]
    for ident in dict.fromkeys((thread, main)):
        name = "main thread" if ident == main else "thread in the collective"
        text += [f"The {name} of rank {fault.rank} is here (most recent call last):\n"]
        text += traceback.format_stack(frames[ident]) if ident in frames else ["  it has ended\n"]
    stream = sys.__stderr__ or sys.stderr
    stream.write("".join(text))
    stream.flush()
    recovery.report(fault)


def _of_network(error: RuntimeError) -> bool:
    """Whether a collective failed, rather than the model inside a section; gloo and hccl have no error class."""
    text = str(error).lower()
    marks = ("gloo", "nccl", "hccl", "connection closed", "connection reset", "connection refused", "broken pipe")
    return isinstance(error, dist.DistError) or any(mark in text for mark in marks)
