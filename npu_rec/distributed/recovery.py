"""What happens when ranks fail: the exit code of a hung collective, and hooks for a cluster's recovery.

A hook derives from `RecoveryHook` and is added by a module that `imports:` of the configuration names:

    class Pager(RecoveryHook):
        def fault(self, fault):
            page(f"rank {fault.rank}: {fault.message}")

    add_hook(Pager())

Exit codes of all commands stand in docs/faults.md.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the run itself, start it again


@dataclass(frozen=True)
class Fault:
    """Why this rank cannot go on.

    Attributes:
        kind: `hung`: a collective did not end in time, the process is about to exit with EXIT_HUNG; `failed`: a
            collective ended with an error of the network, a DistributedError follows.
        rank, size: this rank among all.
        operation: name of the collective; None where another rank waited and ended the run.
        suspects: ranks that are to blame, as far as known.
        message: one line for people.
    """

    kind: Literal["hung", "failed"]
    rank: int
    size: int
    operation: str | None
    suspects: tuple[int, ...]
    message: str


class RecoveryHook:
    """Told about the life of this rank. Every method does nothing unless overridden."""

    def started(self, rank: int, size: int) -> None:
        """The ranks have found each other; errors end the run."""

    def fault(self, fault: Fault) -> None:
        """This rank cannot go on. May run in another thread than training; collectives are out of the question.

        After `hung` it has 30 seconds, together with the other hooks. Errors are logged.
        """

    def ended(self) -> None:
        """Training is done; not called when it failed."""


_hooks: list[RecoveryHook] = []


def add_hook(hook: RecoveryHook) -> None:
    """Tell `hook` from now on; hooks are called in the order of their adding."""
    _hooks.append(hook)


def started(rank: int, size: int) -> None:
    """Tell the hooks that training on several ranks starts."""
    for hook in _hooks:
        hook.started(rank, size)


def report(fault: Fault) -> None:
    """Tell the hooks about a fault; one that fails does not keep the others from hearing it."""
    for hook in _hooks:
        try:
            hook.fault(fault)
        except Exception as error:
            log.warning("recovery hook %s failed: %s: %s", type(hook).__name__, type(error).__name__, error)


def ended() -> None:
    """Tell the hooks that training is done."""
    for hook in _hooks:
        hook.ended()
