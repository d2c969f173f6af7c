"""Who keeps a group waiting, judged from the states that ranks have published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npu_rec.distributed.heartbeat import Seen
from npu_rec.distributed.sections import Entry, group_name

_SHOWN = 8


def blame(
    entry: Entry, others: Sequence[int], seen: Mapping[int, Seen], now: float, patience: float
) -> tuple[list[int], str]:
    """The ranks that are not where this one waits, and a clause that says so.

    Args:
        entry: the section in which this rank waits.
        others: the other ranks of its group.
        seen: their last states.
        now: the clock of `Seen.changed`, seconds.
        patience: seconds without a new state after which a rank counts as dead or stopped.
    """
    reasons = {rank: _reason(entry, rank, seen.get(rank), now, patience) for rank in others}
    suspects = [rank for rank, reason in reasons.items() if reason is not None]
    if not suspects:
        return [], "all ranks of its group are in it: the network or a card does not answer"
    shown = [str(reasons[rank]) for rank in suspects[:_SHOWN]]
    more = f", and {len(suspects) - _SHOWN} more ranks" if len(suspects) > _SHOWN else ""
    return suspects, ", ".join(shown) + more


def _reason(entry: Entry, rank: int, seen: Seen | None, now: float, patience: float) -> str | None:
    """Why the rank is to blame; None: it is in the section as well."""
    if seen is None:
        return f"rank {rank} has never reported"
    state: dict[str, Any] = seen.state["groups"].get(
        group_name(entry.group), {"entered": 0, "open": [], "last": None, "quiet": 0.0}
    )
    open_ = dict(state["open"])
    if open_:
        place = f"in {state['open'][-1][1]!r}"
    else:
        place = f"after {state['last']!r}" if state["last"] else "before the first"
    if seen.state["ended"]:
        return f"rank {rank} has ended its run, {place}"
    silent = now - seen.changed
    if silent >= patience:
        return f"rank {rank} has given no sign of life for at least {silent:.1f} s and was last seen {place}"
    if state["entered"] < entry.number:
        where = f"still {place}" if open_ else f"outside any collective, {place},"
        return f"rank {rank} is {where} for {state['quiet'] + silent:.1f} s"
    if entry.number not in open_:
        return f"rank {rank} is past it, {place}"
    if open_[entry.number] != entry.what:
        return f"rank {rank} is in {open_[entry.number]!r} instead: ranks run different collectives"
    return None
