"""The stretches of work in which this process waits for others, as it enters and leaves them.

Sections are kept by process group: the ranks of a group enter the same sections in the same order, so that the
number of a section means the same on all of them, whatever other groups and threads do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Event(Protocol):
    """A mark in the queue of a device."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...


def event_recorder(device: torch.device) -> Callable[[], Event] | None:
    """Marks the queue of a device; None for the CPU, where a collective that has returned is done."""
    if device.type == "cpu":
        return None

    def record() -> Event:
        event = torch.Event(device)
        event.record()
        return event

    return record


class Clock:
    """Seconds without those in which the process was stopped: a job that was suspended has not been waiting."""

    def __init__(self, interval: float) -> None:
        self._longest = interval + 1.0  # a tick that came later than this was not just late
        self._at = (0.0, monotonic())  # one attribute: read and replaced as a whole by several threads

    def now(self) -> float:
        """Seconds since the start."""
        seconds, tick = self._at
        return seconds + min(monotonic() - tick, self._longest)

    def tick(self) -> None:
        """To be called every `interval` seconds."""
        self._at = (self.now(), monotonic())


@dataclass(eq=False)
class Entry:
    """One section that is not done.

    Attributes:
        number: its place in the order of its group, from 1.
        thread: the one that entered it.
        left: when the host left it with work on the device outstanding; None inside.
        event: done when the device has come past the section; None inside.
    """

    group: dist.ProcessGroup | None
    number: int
    what: str
    thread: int
    left: float = 0.0
    event: Event | None = None


@dataclass(eq=False)
class _Channel:
    """The sections of one group.

    Attributes:
        inside: those that the host is in, the outermost first.
        launched: those behind the host and still before the device, the oldest first.
        last: the name of the one left last.
        changed: when one was entered or left.
    """

    entered: int = 0
    inside: list[Entry] = field(default_factory=list)
    launched: list[Entry] = field(default_factory=list)
    last: str | None = None
    changed: float = 0.0


class Sections:
    """What this process is in; safe to use from several threads."""

    def __init__(self, clock: Clock, record: Callable[[], Event] | None) -> None:
        self._clock, self._record = clock, record
        self._channels: dict[str, _Channel] = {}
        self._lock = threading.Lock()

    def enter(self, what: str, group: dist.ProcessGroup | None) -> Entry:
        """A new section of the group; None: of all ranks, without a group of their own."""
        with self._lock:
            channel = self._channels.setdefault(group_name(group), _Channel())
            channel.entered += 1
            channel.changed = self._clock.now()
            entry = Entry(group, channel.entered, what, threading.get_ident())
            channel.inside.append(entry)
        return entry

    def leave(self, entry: Entry, *, failed: bool = False) -> None:
        """The host is past the section, or it has ended by an error; what is on the device stays watched."""
        event = None if failed or self._record is None else self._record()
        with self._lock:
            channel = self._channels[group_name(entry.group)]
            channel.inside.remove(entry)
            channel.last, channel.changed = entry.what, self._clock.now()
            if event is not None:
                entry.event, entry.left = event, channel.changed
                channel.launched.append(entry)
        if event is not None:
            self._settle(channel)

    def settle(self) -> None:
        """Strike off what devices have done. A driver may block here: not for the thread that must always go on."""
        with self._lock:
            channels = list(self._channels.values())
        for channel in channels:
            self._settle(channel)

    def _settle(self, channel: _Channel) -> None:
        while True:
            with self._lock:
                oldest = channel.launched[0] if channel.launched else None
            if oldest is None or oldest.event is None or not oldest.event.query():
                return
            with self._lock:
                if oldest in channel.launched:
                    channel.launched.remove(oldest)

    def waiting(self) -> list[tuple[Entry, float]]:
        """What each group waits for, and for how many seconds: the oldest section on the device, else the innermost.

        Sections entered and left within a longer one are progress of the longer one.
        """
        now, found = self._clock.now(), []
        with self._lock:
            for channel in self._channels.values():
                if channel.launched:
                    found.append((channel.launched[0], now - channel.launched[0].left))
                elif channel.inside:
                    found.append((channel.inside[-1], now - channel.changed))
        return found

    def snapshot(self) -> dict[str, Any]:
        """By group: `entered`, `open` (number, name), `last`, and `quiet`: seconds since one was entered or left."""
        now = self._clock.now()
        with self._lock:
            return {
                name: {
                    "entered": channel.entered,
                    "open": [[entry.number, entry.what] for entry in (*channel.launched, *channel.inside)],
                    "last": channel.last,
                    "quiet": now - channel.changed,
                }
                for name, channel in self._channels.items()
            }


def group_name(group: dist.ProcessGroup | None) -> str:
    """The same on all ranks of a group."""
    return "" if group is None else str(group.group_name)


def group_ranks(group: dist.ProcessGroup | None, size: int) -> list[int]:
    """Global ranks of a group."""
    return list(range(size)) if group is None else dist.get_process_group_ranks(group)
