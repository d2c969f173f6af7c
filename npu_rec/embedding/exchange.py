"""Rows from the ranks that hold them to those that read them, and their gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from npu_rec.distributed import World


@dataclass(frozen=True)
class Traffic:
    """Rows of one table between this rank and each rank of the world.

    Attributes:
        answers: `[W]`, rows that this rank sends to each.
        asked: `[W]`, rows that each sends here.
        width: columns that this rank sends; `widths [W]`, that each sends here.
        by_columns: what arrives lies beside each other (each rank has some columns of every row).
    """

    answers: list[int]
    asked: list[int]
    width: int
    widths: list[int]
    by_columns: bool


def exchange_rows(world: World, traffic: Sequence[Traffic], rows: Sequence[Tensor]) -> list[Tensor]:
    """One exchange for all tables, differentiable.

    Args:
        rows: of each table `[sum of answers, width]`, by reading rank.

    Returns:
        Of each table what was asked for, `[U, D]`, in the order of asking.
    """
    return list(_Exchange.apply(world, traffic, *rows))  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, world: World, traffic: Sequence[Traffic], *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.world, ctx.traffic = world, traffic
        outgoing = [r.split(t.answers) for r, t in zip(rows, traffic, strict=True)]
        shapes = [[(n, w) for n, w in zip(t.asked, t.widths, strict=True)] for t in traffic]
        arrived = _all_to_all(world, outgoing, shapes, "rows to their readers")
        return tuple(
            torch.cat(parts, int(t.by_columns)) if len(parts) > 1 else parts[0]
            for parts, t in zip(arrived, traffic, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        outgoing = [
            g.split(t.widths, 1) if t.by_columns else g.split(t.asked)
            for g, t in zip(gradients, ctx.traffic, strict=True)
        ]
        shapes = [[(n, t.width) for n in t.answers] for t in ctx.traffic]
        arrived = _all_to_all(ctx.world, outgoing, shapes, "gradients of rows to their owners")
        return (None, None, *(torch.cat(parts) for parts in arrived))


def _all_to_all(
    world: World, outgoing: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, int]]], what: str
) -> list[list[Tensor]]:
    """`outgoing[table][rank]` to the ranks; what they send, of `shapes[table][rank]`, alike. One message a rank."""
    ranks = range(world.size)
    flat = torch.cat([table[rank].reshape(-1) for rank in ranks for table in outgoing])
    send = [sum(table[rank].numel() for table in outgoing) for rank in ranks]
    sizes = [[rows * width for rows, width in (table[rank] for table in shapes)] for rank in ranks]
    received = world.all_to_all(flat, send, [sum(s) for s in sizes], what)
    arrived: list[list[Tensor]] = [[] for _ in outgoing]
    for rank, part in zip(ranks, received.split([sum(s) for s in sizes]), strict=True):
        for table, piece in enumerate(part.split(sizes[rank])):
            arrived[table].append(piece.view(shapes[table][rank]))
    return arrived


def take_own(rows: Tensor, replicas: World, counts: Sequence[int]) -> Tensor:
    """This replica's part of the rows `[sum of counts, D]` that all replicas of a block look up together.

    The gradient of the others' parts comes from them, so each replica makes the same update.
    """
    return rows if replicas.size == 1 else _TakeOwn.apply(rows, replicas, counts)  # type: ignore[no-untyped-call]


class _TakeOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, replicas: World, counts: Sequence[int]) -> Tensor:
        ctx.replicas, ctx.counts = replicas, list(counts)
        first = list(accumulate(counts, initial=0))[replicas.rank]
        return rows[first : first + counts[replicas.rank]].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        mine = gradient.repeat(ctx.replicas.size, 1)
        send = [gradient.shape[0]] * ctx.replicas.size
        return ctx.replicas.all_to_all(mine, send, ctx.counts, "gradients of rows to the other replicas"), None, None
