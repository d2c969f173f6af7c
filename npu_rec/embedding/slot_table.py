"""A table whose rows are in slots: dynamic tables, and tables with more rows than the device's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from npu_rec.embedding.placement import BlockPlacement, Placement
from npu_rec.embedding.row_memory import RowMemory
from npu_rec.embedding.slots import SlotMap, SlotPolicy
from npu_rec.embedding.store import DiskStore, HostStore, RowStore
from npu_rec.embedding.table import EmbeddingTable, TableSpec
from npu_rec.embedding.tier import Tier
from npu_rec.errors import StorageError
from npu_rec.ops import RowOptimizer, embedding_lookup

_ROWS_AT_ONCE = 1 << 16
_RECORDS = 1 << 28  # that the file of a dynamic table has places for, on each rank


@dataclass(frozen=True)
class SlotChanges:
    """What happens before a step reads its slots; tensors of the host.

    Attributes:
        slots: how many there must be.
        leaving_ids, leaving_slots: `[E]`, rows that move to the tier below.
        coming_ids, coming_slots: `[C]`, rows that come back from it.
        fresh_slots, fresh_rows: `[N]`, `[N, D]`, rows that start.
        refused: `[R]` bool, those asked for without a row, or None for nobody.
        refused_rows: `[K, D]`, what they are answered with.
    """

    slots: int
    leaving_ids: Tensor
    leaving_slots: Tensor
    coming_ids: Tensor
    coming_slots: Tensor
    fresh_slots: Tensor
    fresh_rows: Tensor
    refused: Tensor | None
    refused_rows: Tensor


class SlotTable(EmbeddingTable):
    """Rows by id, made when an id first occurs.

    Without a tier below, a row that is evicted is forgotten, and starts anew should its id come back. With one (host
    memory or disk), the slots are a cache of hot rows: rows move down and up with their optimiser state.

    Attributes:
        below: what kind of memory the tier is in; `open_tier` makes it.
        memory: the slots; they grow by doubling, up to the limit of the policy.
        hits, misses: with a tier, distinct ids of the steps that were in slots, and that came into one.
    """

    needs_plan = True

    def __init__(
        self,
        spec: TableSpec,
        placement: Placement,
        rank: int = 0,
        backend: str = "auto",
        *,
        policy: SlotPolicy | None = None,
        below: Literal["host", "disk"] | None = None,
    ) -> None:
        super().__init__(spec, placement, rank, backend)
        self.policy, self.below = policy or SlotPolicy(), below
        self.map = SlotMap(self.policy, spec.name, spec.seed)
        self.tier: Tier | None = None
        self.memory = RowMemory(spec.dim)
        self.hits = self.misses = 0
        self._planned = False  # slots are given out, rows not yet in them

    def use(self, optimizer: RowOptimizer) -> None:
        self.optimizer = optimizer
        self.memory.use(optimizer)

    @property
    def weight(self) -> Tensor:
        """`[slots, D]` on the device."""
        return self.memory.weight

    def open_tier(self, folder: Path) -> None:
        """Make the tier below, empty, for rows with the state of the optimiser there is; `folder` is for its files."""
        if self.below is None:
            return
        self._folder = folder
        width = sum(self.memory.widths)
        first = 0
        records = _RECORDS
        if isinstance(self.placement, BlockPlacement):
            block = self.placement.block(self.rank)
            first, records = block.first_row, block.rows
        self.close()
        store: RowStore = HostStore(width)
        if self.below == "disk":
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"embedding.tier_path: {folder} cannot be made: {error}") from None
            store = DiskStore(folder / f"{self.spec.name}-{self.rank}.rows", width, records)
        self.tier = Tier(store, first if isinstance(self.placement, BlockPlacement) else None)

    def close(self) -> None:
        """Let go of the tier and its files: checkpoints have the rows."""
        if self.tier is not None:
            self.tier.store.close()
            self.tier = None

    def plan(self, ids: Tensor, counts: Tensor, step: int) -> tuple[Tensor, SlotChanges]:
        self._check_settled("planned again")
        found = self.map.assign(ids, counts, step, None if self.tier is None else self.tier.holds)
        below = torch.zeros_like(found.entered_ids, dtype=torch.bool)
        if self.tier is not None:
            below = self.tier.holds(found.entered_ids)
            self.misses += found.entered_ids.shape[0]
            self.hits += torch.unique(found.slots[found.slots >= 0]).shape[0] - found.entered_ids.shape[0]
        refused = found.slots < 0
        anybody = bool(refused.any())
        changes = SlotChanges(
            slots=self.map.seen.map.slot_limit,
            leaving_ids=found.evicted_ids,
            leaving_slots=found.evicted_slots,
            coming_ids=found.entered_ids[below],
            coming_slots=found.entered_slots[below],
            fresh_slots=found.entered_slots[~below],
            fresh_rows=self.spec.initial_rows(found.entered_ids[~below]),
            refused=refused if anybody else None,
            refused_rows=self.spec.initial_rows(ids[refused]),
        )
        self._planned = True
        return found.slots, changes

    def rows(self, slots: Tensor, changes: SlotChanges) -> Tensor:
        self._change(changes)
        weight = self.weight.detach().requires_grad_()
        if changes.refused is None:
            return embedding_lookup(weight, slots, optimizer=self.optimizer, backend=self.backend)
        # those with a row first, then the others, and back; found on the host
        order = torch.cat([torch.nonzero(~changes.refused), torch.nonzero(changes.refused)]).squeeze(1)
        has_row = order[: slots.shape[0] - changes.refused_rows.shape[0]].to(slots.device)
        rows = embedding_lookup(weight, slots[has_row], optimizer=self.optimizer, backend=self.backend)
        together = torch.cat([rows, changes.refused_rows.to(rows)])
        return together.index_select(0, torch.argsort(order).to(slots.device))

    def _check_settled(self, what: str) -> None:
        if self._planned:
            raise RuntimeError(f"table {self.spec.name} is {what} before the rows of its last plan were looked up")

    @torch.no_grad()
    def _change(self, changes: SlotChanges) -> None:
        self._planned = False
        self.memory.grow(changes.slots, self.policy.limit)
        if self.tier is not None:
            self.tier.put(changes.leaving_ids, self.memory.records(changes.leaving_slots))
        self.memory.place(changes.fresh_slots, self.memory.fresh(changes.fresh_rows))
        if self.tier is not None:
            self.memory.place(changes.coming_slots, self.tier.get(changes.coming_ids))

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        self._check_settled("read")
        rows = self.spec.initial_rows(ids)
        slots = self.map.seen.map.find(ids)
        if self.tier is not None:
            below = (slots < 0) & self.tier.holds(ids)
            rows[below] = self.tier.get(ids[below])[:, : self.spec.dim]
        rows = rows.to(self.weight)
        here = slots >= 0
        if bool(here.any()):
            rows[here.to(rows.device)] = self.weight[slots[here].to(rows.device)]
        return rows

    def counters(self) -> dict[str, float]:
        """Rows, those that wait for admission, and totals since the start of the process."""
        seen = self.map.seen.map
        values = {
            "rows": len(seen),
            "load_factor": seen.load_factor,
            "waiting": len(self.map.waiting.map),
            "evicted": self.map.evicted,
            "expired": self.map.expired,
            "refused": self.map.refused,
        }
        if self.tier is not None:
            store = self.tier.store
            values |= {"hits": self.hits, "misses": self.misses}
            values |= {"bytes_read": store.bytes_read, "bytes_written": store.bytes_written}
        return {name: float(value) for name, value in values.items()}

    def export(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All rows, in pieces: ids `[n]` and, on the host, what belongs to each.

        That is `weight [n, D]`, the optimiser's `square [n]` and `momentum [n, D]`, `last_step [n]` and `count [n]`.
        """
        self._check_settled("exported")
        seen = self.map.seen
        ids, slots = seen.map.items()
        for some, where in zip(ids.split(_ROWS_AT_ONCE), slots.split(_ROWS_AT_ONCE), strict=True):
            parts = self.memory.named(self.memory.records(where))
            yield some, {**parts, "last_step": seen.last_step[where], "count": seen.count[where]}
        if self.tier is not None:
            for some, records in self.tier.items(_ROWS_AT_ONCE):
                below = seen.map.find(some) < 0  # what it has of the others is out of date
                parts, unknown = self.memory.named(records[below]), torch.zeros_like(some[below])
                yield some[below], {**parts, "last_step": unknown, "count": unknown.clone()}

    @torch.no_grad()
    def load(self, pieces: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> None:
        """Take the rows of `export`, of any ranks, that this rank holds, in place of all there are.

        Without a tier that is open they may be more than the limit of the policy, which holds from the next step on.
        """
        self.map.clear()
        if self.tier is not None:
            self.open_tier(self._folder)
        seen = self.map.seen
        for ids, columns in pieces:
            mine = self.owns(ids)
            ids, columns = ids[mine], {name: x[mine] for name, x in columns.items()}
            records = self.memory.unnamed(columns)
            if self.tier is not None and len(seen.map) + len(ids) > (self.policy.limit or 0):
                self.tier.put(ids, records)
                continue
            slots = seen.insert(ids, columns["last_step"], columns["count"])
            self.memory.grow(seen.map.slot_limit, self.policy.limit)
            self.memory.place(slots, records)
