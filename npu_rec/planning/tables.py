"""What every rank holds of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npu_rec.embedding import EmbeddingTable, SlotTable, StaticTable
from npu_rec.embedding.placement import BlockPlacement, HashPlacement, Placement
from npu_rec.errors import TrainingError


@dataclass(frozen=True)
class TableParts:
    """One table, over all ranks.

    Attributes:
        rows, dim: of the whole; a dynamic table is taken to have a row for every item.
        placement: `row_wise`, `table_wise`, `column_wise`, `replicated`, or `hash` for rows by id.
        held: `[ranks]`, numbers of each rank's rows on its device.
        below: `[ranks]`, of those in the tier below.
        tier: `host`, `disk` or `device` for none.
        state: what the optimiser keeps for each of those numbers.
        simulated: bytes of the rows and of their states that the simulated rank had in its step.
    """

    name: str
    rows: int
    dim: int
    placement: str
    held: list[int]
    below: list[int]
    tier: str
    state: float
    simulated: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Of the whole table."""
        return self.rows * self.dim

    def bytes_of(self, rank: int) -> int:
        """On the device, with states."""
        return int(4 * self.held[rank] * (1 + self.state))

    def bytes_below(self, rank: int) -> int:
        """In the tier below, with states."""
        return int(4 * self.below[rank] * (1 + self.state))

    def settle(self, held: dict[str, int], rank: int) -> None:
        """Put what comes with ids, of which one step brought few, at what there will be."""
        rows, states = self.simulated
        more, more_states = 4 * self.held[rank] - rows, int(4 * self.held[rank] * self.state) - states
        held["tables"] += more
        held["table_states"] += more_states
        held["peak"] += more + more_states


def table_parts(table: EmbeddingTable, num_items: int, ranks: int) -> TableParts:
    """Of a table that took part in a step of `ranks` ranks.

    Raises:
        TrainingError: the ids of a step do not fit into `embedding.rows`.
    """
    dim = table.spec.dim
    if isinstance(table, StaticTable):
        placement = table.placement
        blocks = [placement.block(rank % placement.ranks) for rank in range(ranks)]
        held = [block.rows * block.columns for block in blocks]
        size = table.weight.numel()
        kept = table.optimizer
        states = 2 * size if kept is None else sum(x.numel() for x in (kept.square, kept.momentum) if x is not None)
        kind: str = "replicated" if ranks > 1 and placement.ranks == 1 else placement.kind
        return _parts(table, placement.num_rows, kind, held, [0] * ranks, "device", states / max(1, size))
    assert isinstance(table, SlotTable)
    by_block = isinstance(table.placement, BlockPlacement)
    every = [_rows_of(table.placement, rank, num_items + 1) for rank in range(ranks)]
    limit = table.policy.limit
    device = every if limit is None else [min(rows, limit) for rows in every]
    _check_limit(table, every)
    widths = table.memory.widths
    held, below = [rows * dim for rows in device], [(a - b) * dim for a, b in zip(every, device, strict=True)]
    kind, tier = "row_wise" if by_block else "hash", table.below or "device"
    return _parts(table, num_items + 1, kind, held, below if table.below else [0] * ranks, tier, sum(widths[1:]) / dim)


def _parts(table: Any, rows: int, kind: str, held: list[int], below: list[int], tier: str, state: float) -> TableParts:
    simulated = table.weight.nbytes
    if isinstance(table, SlotTable):
        states = sum(x.nbytes for x in table.memory.state().values())
    else:
        states = int(state * simulated)
    return TableParts(table.spec.name, rows, table.spec.dim, kind, held, below, tier, state, (simulated, states))


def _rows_of(placement: Placement, rank: int, total: int) -> int:
    """Rows that a rank may come to hold."""
    if isinstance(placement, BlockPlacement):
        return placement.block(rank % placement.ranks).rows
    assert isinstance(placement, HashPlacement)
    return -(-total // placement.ranks)


def _check_limit(table: SlotTable, every: list[int]) -> None:
    """Raise TrainingError when the distinct ids that all ranks ask one for in a step are more than its slots."""
    assert isinstance(table.placement, (BlockPlacement, HashPlacement))
    limit, ranks = table.policy.limit, table.placement.ranks
    own = len(table.map.seen.map)  # those that the simulated rank alone asked for
    rows = max(every)
    wanted = int(rows * (1 - (1 - min(1.0, own / rows)) ** ranks)) if rows else 0
    if limit is not None and wanted > limit:
        raise TrainingError(
            f"table {table.spec.name}: a step reads about {wanted:,} rows of one rank, more than the {limit:,} of "
            "embedding.rows; raise it, or make batches smaller"
        )
