"""A plan, and where it does not fit what would make it fit: found by planning that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from npu_rec.config import Config
from npu_rec.errors import ConfigError
from npu_rec.planning.changes import Change, Shortage, changed, harmless, more_cards, others, smallest_batch
from npu_rec.planning.plan import MOST_CARDS, Machines, Plan, plan_step
from npu_rec.tasks import DataFacts


def make_plan(
    config: Config,
    facts: DataFacts,
    machines: Machines,
    length: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plan a training step in which every sequence has `length` events (None: as many as the model sees).

    Args:
        tell: hears what is being tried where it does not fit.

    Raises:
        ConfigError: the configuration cannot be built on so many cards.
    """
    plan = plan_step(config, facts, machines, length)
    if plan.fits:
        return plan
    return replace(plan, changes=_tried(config, facts, machines, length, plan, tell))


def _tried(
    config: Config,
    facts: DataFacts,
    machines: Machines,
    length: int | None,
    plan: Plan,
    tell: Callable[[str], None],
) -> list[Change]:
    """Changes one by one; then those together that help and leave the numbers alone; last, more cards."""
    shortage, tried = _shortage(plan, machines), []

    def attempt(settings: dict[str, Any], same: bool, cards: int = machines.cards) -> Change:
        tell(f"does not fit; trying {described(settings, cards)}")
        more = machines if cards == machines.cards else _with_cards(machines, cards)
        tried.append(_try(config, facts, more, length, settings, same))
        return tried[-1]

    together: dict[str, Any] = {}
    for settings in harmless(config, shortage):
        needed = attempt(settings, same=True).bytes_per_card_max
        together |= settings if needed is not None and needed < plan.bytes_per_card_max else {}
    for settings in others(config, shortage):
        attempt(settings, same=False)
    if together and together not in [change.settings for change in tried]:
        attempt(together, same=True)
    smaller = smallest_batch(config, together, machines.cards)
    if smaller is not None and not any(change.fits for change in tried):
        attempt(smaller, same=False)
    for cards in more_cards(shortage, min(MOST_CARDS, 16 * machines.cards)):
        if not any(change.fits for change in tried):
            attempt({}, same=True, cards=cards)
    return tried


def _shortage(plan: Plan, machines: Machines) -> Shortage:
    memory, tables = plan.memory, plan.tables
    held = sum(table["bytes_per_card_max"] for table in tables)
    return Shortage(
        cards=machines.cards,
        cards_per_node=machines.cards_per_node,
        memory=machines.memory,
        host_memory=machines.host_memory,
        needed=plan.bytes_per_card_max,
        lasting=held + memory.parameters + memory.optimizer_states + memory.gradients + plan.communicators,
        fixed=memory.parameters + memory.optimizer_states + memory.gradients + plan.communicators,
        held=held,
        row_bytes=sum(4 * table["dim"] * (1 + table["state"]) for table in tables),
        sequences=plan.load.sequences,
    )


def described(settings: dict[str, Any], cards: int) -> str:
    """A change in words: its settings, or more cards."""
    return ", ".join(f"{name}={str(value).lower()}" for name, value in settings.items()) or f"{cards:,} cards"


def _with_cards(machines: Machines, cards: int) -> Machines:
    nodes = -(-cards // machines.cards_per_node)
    return Machines(nodes, cards // nodes, machines.memory, machines.host_memory)


def _try(
    config: Config, facts: DataFacts, machines: Machines, length: int | None, settings: dict[str, Any], same: bool
) -> Change:
    try:
        plan = plan_step(changed(config, settings), facts, machines, length)
    except ConfigError as error:
        return Change(settings, machines.cards, None, False, same, str(error))
    return Change(settings, machines.cards, plan.bytes_per_card_max, plan.fits, same, "; ".join(plan.problems))
