"""All tables of a model: what a batch needs of them, planned ahead on the host, and the rows themselves.

A plan says which rank is asked for which rows. Making it exchanges ids alone, on the host, so that it runs ahead of
the step, beside the work of the device; the step then moves rows and gradients, and waits for no count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npu_rec.distributed import World
from npu_rec.distributed.world import ALONE
from npu_rec.embedding.exchange import Traffic, exchange_rows, take_own
from npu_rec.embedding.table import EmbeddingTable, StaticTable
from npu_rec.ops import embedding_lookup


@dataclass(frozen=True)
class TablePlan:
    """What a step reads of one table.

    Attributes:
        places: `[T]` int64: of each id its place among the rows that arrive. Where no plan is needed, the ids.
        slots: `[R]` int64: the local rows that this rank looks up, by replica and asking rank; for a rank alone, those
            of the ids. None where no plan is needed.
        changes: what the table does first.
        traffic: to and from the ranks; None for a rank alone.
        replica_counts: how many of `slots` each replica asked for.
    """

    places: Tensor
    slots: Tensor | None = None
    changes: Any = None
    traffic: Traffic | None = None
    replica_counts: Sequence[int] = ()

    def to(self, device: torch.device) -> TablePlan:
        """The plan with its indices on a device."""
        slots = None if self.slots is None else self.slots.to(device, non_blocking=True)
        return replace(self, places=self.places.to(device, non_blocking=True), slots=slots)


Plan = Mapping[str, TablePlan]


class EmbeddingCollection:
    """The tables of a model on the ranks of a world.

    Args:
        world: the ranks; `plan` uses it from whatever thread calls it, so it needs a group of its own (`World.twin`).
        rows_world: the same ranks for rows and gradients.
        replicas: 2-D sharding: the ranks that hold the same blocks as this one. `world` are then those of one replica.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingTable],
        world: World = ALONE,
        rows_world: World = ALONE,
        replicas: World = ALONE,
        rows_replicas: World = ALONE,
    ) -> None:
        self.tables = {table.spec.name: table for table in tables}
        self.world, self.rows_world, self.replicas, self.rows_replicas = world, rows_world, replicas, rows_replicas
        self.step = 0  # plans made in training; admission, eviction and age count it

    @property
    def ranks(self) -> int:
        """How many ranks hold parts of the tables; 1: this process has all of them."""
        return self.world.size * self.replicas.size

    @property
    def needs_plan(self) -> bool:
        """Whether ids must be known on the host before a step."""
        return self.ranks > 1 or any(table.needs_plan for table in self.tables.values())

    def plan(self, ids: Mapping[str, Tensor], occurrences: Mapping[str, Tensor] | None = None) -> Plan:
        """What a training step needs for `{table: ids [T]}`; collective: all ranks plan the same steps in one order.

        Args:
            occurrences: `[T]` int64, how often each id counts as seen (for admission and eviction); 1 where not given.

        Raises:
            IndexError: an id lies outside its table.
        """
        if not self.needs_plan:
            for name, wanted in ids.items():
                self._note(self.tables[name], wanted)
            return {name: TablePlan(wanted) for name, wanted in ids.items()}
        seen = {name: torch.ones_like(wanted) for name, wanted in ids.items()} | dict(occurrences or {})
        for name, wanted in ids.items():
            _check_range(self.tables[name], wanted)
        self.step += 1
        if self.ranks == 1:  # no need to bring equal ids together
            return {name: self._plan_alone(self.tables[name], wanted, seen[name]) for name, wanted in ids.items()}
        questions = [_Question.of(self.tables[name], wanted, seen[name]) for name, wanted in ids.items()]
        return {
            name: self._plan_table(self.tables[name], question, arrived)
            for name, question, arrived in zip(ids, questions, self._ask(questions), strict=True)
        }

    @staticmethod
    def _note(table: EmbeddingTable, ids: Tensor) -> None:
        if table.touched is not None:
            table.touched.add(ids)

    def _plan_alone(self, table: EmbeddingTable, ids: Tensor, occurrences: Tensor) -> TablePlan:
        self._note(table, ids)
        slots, changes = table.plan(ids, occurrences, self.step)
        return TablePlan(slots[:0], slots, changes)

    def _plan_table(self, table: EmbeddingTable, question: _Question, arrived: _Arrived) -> TablePlan:
        replica_counts = [arrived.ids.shape[0]]
        ids, counts = arrived.ids, arrived.counts
        if self.replicas.size > 1:
            pairs = self.replicas.all_gather_rows(torch.stack([ids, counts], 1), "ids of the other replicas")
            replica_counts = [pair.shape[0] for pair in pairs]
            ids, counts = torch.cat(pairs).unbind(1)
        self._note(table, ids)
        slots, changes = table.plan(ids.contiguous(), counts.contiguous(), self.step)
        return TablePlan(question.places, slots, changes, self._traffic(table, question, arrived), replica_counts)

    def _traffic(self, table: EmbeddingTable, question: _Question, arrived: _Arrived) -> Traffic:
        widths = [table.placement.width(rank) for rank in range(self.world.size)]
        own = widths[self.world.rank]
        return Traffic(arrived.by_rank, question.by_rank, own, widths, table.placement.by_columns)

    def _ask(self, questions: Sequence[_Question]) -> list[_Arrived]:
        """Send the ids of all tables to the ranks that hold them, in one message a rank."""
        world, tables = self.world, len(questions)
        if world.size == 1:
            return [_Arrived(q.ids, q.counts, q.by_rank) for q in questions]
        numbers = torch.tensor([[q.by_rank[rank] for q in questions] for rank in range(world.size)])
        ones = [1] * world.size
        coming = world.all_to_all(numbers, ones, ones, "how many ids").tolist()
        pieces = [torch.stack([q.ids, q.counts], 1).split(q.by_rank) for q in questions]
        message = torch.cat([pieces[t][rank] for rank in range(world.size) for t in range(tables)])
        totals = [sum(row) for row in coming]
        received = world.all_to_all(message, numbers.sum(1).tolist(), totals, "ids to their owners")
        by_rank = [part.split(row) for part, row in zip(received.split(totals), coming, strict=True)]
        arrived = []
        for t in range(tables):
            ids, counts = torch.cat([parts[t] for parts in by_rank]).unbind(1)
            arrived.append(_Arrived(ids.contiguous(), counts.contiguous(), [row[t] for row in coming]))
        return arrived

    def lookup(self, plan: Plan) -> dict[str, Tensor]:
        """`{table: rows [T, D]}` of a plan whose indices are on the device, differentiable; collective."""
        parts, direct = {}, {}
        for name, each in plan.items():
            table = self.tables[name]
            if each.slots is None:
                assert isinstance(table, StaticTable)
                direct[name] = table(each.places)
            else:
                parts[name] = take_own(table.rows(each.slots, each.changes), self.rows_replicas, each.replica_counts)
        exchanged = [name for name in parts if plan[name].traffic is not None]
        if exchanged:
            traffic = [plan[name].traffic for name in exchanged]
            arrived = exchange_rows(self.rows_world, traffic, [parts[name] for name in exchanged])  # type: ignore[arg-type]
            for name, rows in zip(exchanged, arrived, strict=True):
                parts[name] = embedding_lookup(rows, plan[name].places, backend=self.tables[name].backend)
        return direct | parts

    @torch.no_grad()
    def read(self, name: str, ids: Tensor) -> Tensor:
        """`ids [T]` of this rank -> `[T, D]` on the device, as rows are now, nothing learnt or counted; collective."""
        table = self.tables[name]
        if not self.needs_plan:
            assert isinstance(table, StaticTable)
            return embedding_lookup(table.weight, ids, backend=table.backend)
        ids = ids.cpu()
        _check_range(table, ids)
        if self.world.size == 1:
            return table.read(ids)
        question = _Question.of(table, ids, torch.ones_like(ids))
        (arrived,) = self._ask([question])
        (rows,) = exchange_rows(self.rows_world, [self._traffic(table, question, arrived)], [table.read(arrived.ids)])
        return rows[question.places.to(rows.device)]


def _check_range(table: EmbeddingTable, ids: Tensor) -> None:
    rows = table.spec.num_rows
    if rows is not None and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(f"table {table.spec.name}: ids reach from {low} to {high}: out of range of {rows} rows")


@dataclass(frozen=True)
class _Question:
    """The distinct ids of a table that this rank needs, by the rank that holds them."""

    places: Tensor  # [T]: of each id its place among the distinct ones, as they arrive
    ids: Tensor  # [U], for column-wise tables once for each rank
    counts: Tensor  # alike: occurrences in the batch
    by_rank: list[int]

    @staticmethod
    def of(table: EmbeddingTable, ids: Tensor, occurrences: Tensor) -> _Question:
        distinct, places = torch.unique(ids, return_inverse=True)
        counts = torch.zeros_like(distinct).index_add_(0, places, occurrences)
        order, by_rank = table.placement.ask(distinct)
        if not table.placement.by_columns:
            places = torch.argsort(order)[places]
        return _Question(places, distinct[order], counts[order], by_rank)


@dataclass(frozen=True)
class _Arrived:
    """Ids of a table that ranks ask this one for, by asking rank."""

    ids: Tensor
    counts: Tensor
    by_rank: list[int]
