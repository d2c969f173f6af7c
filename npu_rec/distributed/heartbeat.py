"""What ranks tell each other about themselves through the rendezvous store, while collectives may hang.

Each rank writes its state under a key of its own; a number in it that grows is its sign of life, so that the clocks
of machines need not agree. The others' states are read only when something is wrong.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from npu_rec.distributed.sections import Clock, Sections

_VERDICT = "verdict"


@dataclass(frozen=True)
class Seen:
    """The last state of another rank, and when its sign of life was last another one."""

    state: dict[str, Any]
    changed: float


@dataclass(frozen=True)
class Verdict:
    """Why a rank has ended the run."""

    rank: int
    message: str
    suspects: list[int]


class Heartbeat:
    """A thread that alone talks to the store: an access may block for as long as the store's host is stopped.

    Attributes:
        watched: ranks whose states are to be read.
        seen: what was read of them.
        verdict: another rank's.
        answered: when the store last did.
        error: the store's last word; there is no thread any more.
    """

    def __init__(self, rank: int, store: Store, interval: float, clock: Clock, sections: Sections) -> None:
        connection: Store = store.clone()  # type: ignore[attr-defined]  # of its own: a store serves one call at a time
        connection.set_timeout(timedelta(seconds=max(1.0, interval)))
        self._store = PrefixStore("npu_rec/watchdog", connection)
        self._rank, self._interval, self._clock, self._sections = rank, interval, clock, sections
        self._beat = 0
        self._reported: set[int] = set()
        self._own: Verdict | None = None
        self._wake, self._ending = threading.Event(), False
        self.watched: set[int] = set()
        self.seen: dict[int, Seen] = {}
        self.verdict: Verdict | None = None
        self.answered = clock.now()
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def announce(self, verdict: Verdict) -> None:
        """Tell the others, at once."""
        self._own = verdict
        self._wake.set()

    def close(self) -> None:
        """Tell the others that this rank has ended, and stop; not later than the store's timeout."""
        self._ending = True
        self._wake.set()
        self._thread.join(max(1.0, self._interval))

    def _run(self) -> None:
        try:
            while not self._ending:
                self._exchange()
                self._wake.wait(self._interval)
                self._wake.clear()
            self._exchange()
        except Exception as error:  # whatever a store raises: the watchdog needs its text when something hangs
            self.error = (str(error).strip().splitlines() or [type(error).__name__])[0]

    def _exchange(self) -> None:
        self._beat += 1
        state = {"beat": self._beat, "ended": self._ending, "groups": self._sections.snapshot()}
        self._store.set(str(self._rank), json.dumps(state))
        if self._own is not None:
            self._store.set(_VERDICT, json.dumps(vars(self._own)))
        elif self.verdict is None and self._store.check([_VERDICT]):
            self.verdict = Verdict(**json.loads(self._store.get(_VERDICT)))
        self._read(sorted(self.watched))
        self.answered = self._clock.now()

    def _read(self, ranks: list[int]) -> None:
        self._reported |= {rank for rank in ranks if rank not in self._reported and self._store.check([str(rank)])}
        present = [rank for rank in ranks if rank in self._reported]
        if not present:
            return
        for rank, text in zip(present, self._store.multi_get([str(rank) for rank in present]), strict=True):
            state, known = json.loads(text), self.seen.get(rank)
            same = known is not None and known.state["beat"] == state["beat"]
            self.seen[rank] = Seen(state, known.changed if same and known is not None else self._clock.now())
