"""Plans and simulated ranks as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from npu_rec.planning.advice import described
from npu_rec.planning.plan import Movement, Plan, size
from npu_rec.planning.simulate import Memory

_MEMORY = {
    "tables": "rows of the tables",
    "table_states": "what their optimiser keeps",
    "parameters": "other parameters",
    "optimizer_states": "what AdamW keeps",
    "gradients": "gradients",
    "activations": "activations for the backward pass",
    "buffers": "the batch, its plan, DDP's buckets",
    "peak": "at the fullest moment of a step",
}


def memory_table(memory: Memory, communicators: int = 0) -> Table:
    """What one card holds."""
    table = Table("a card holds", "", title_justify="left")
    rows = asdict(memory)
    for name, words in _MEMORY.items():
        if name == "peak" and communicators:
            table.add_row("buffers of HCCL", size(communicators))
        table.add_row(words, size(rows[name] + (communicators if name == "peak" else 0)))
    return table


def tables_table(tables: list[dict[str, Any]]) -> Table:
    """Where the embedding tables are."""
    table = Table("table", "rows", "width", "placement", "in all", "fullest card", "largest/mean", "below the device")
    for one in tables:
        below = "" if one["tier"] == "device" else f"{size(one['tier_bytes_per_card'])} a card, {one['tier']}"
        table.add_row(
            one["name"], f"{one['rows']:,}", str(one["dim"]), one["placement"], size(one["bytes"]),
            size(one["bytes_per_card_max"]), f"{one['imbalance']:.3f}", below,
        )  # fmt: skip
    return table


def movements_table(movements: list[Movement]) -> Table:
    """What a card sends in a step."""
    table = Table("a card sends in a step", "collective", "ranks", "within its node", "to other nodes", "ms")
    for one in movements:
        what = f"{one.what} (host)" if one.on_host else one.what
        times = one.op if one.count == 1 else f"{one.count} x {one.op}"
        sent = size(one.bytes_within_node), size(one.bytes_between_nodes)
        table.add_row(what, times, f"{one.ranks:,}", *sent, f"{1e3 * one.seconds:.2f}")
    return table


def headline(plan: Plan) -> str:
    """What is planned, in two lines."""
    load = plan.load
    return (
        f"{plan.name}: {plan.parameters:,} parameters, {plan.table_parameters:,} of them in tables, on {plan.cards:,} "
        f"cards of {size(plan.memory_limit)} in {_count(plan.nodes, 'node')}\n"
        f"a step: {_count(load.sequences, 'sequence')} of {load.length:,} events on the card with the most "
        f"(largest/mean {plan.imbalance['tokens']:.3f}), {plan.flops_per_card:.3g} operations a card"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def verdict(plan: Plan) -> str:
    """Whether it fits."""
    moving = f"{1e3 * plan.seconds_moving:.1f} ms of sending a step, if nothing else went on meanwhile"
    host = [f"{size(n)} {what} a node" for n, what in _below(plan) if n]
    text = "\n".join([moving, *host, *plan.notes])
    if plan.fits:
        return f"{text}\nfits: {size(plan.bytes_per_card_max)} of {size(plan.memory_limit)} a card"
    return f"{text}\ndoes not fit: {'; '.join(plan.problems)}"


def _below(plan: Plan) -> list[tuple[int, str]]:
    return [(plan.host_bytes_per_node, "of host memory"), (plan.disk_bytes_per_node, "of disk")]


def changes_table(plan: Plan) -> Table:
    """What was tried to make it fit."""
    table = Table("with", "fullest card", "fits", "trains the same")
    for change in plan.changes:
        held = "cannot run" if change.bytes_per_card_max is None else size(change.bytes_per_card_max)
        same = "yes" if change.same_training else "no"
        table.add_row(described(change.settings, change.cards), held, "yes" if change.fits else change.reason, same)
    return table
