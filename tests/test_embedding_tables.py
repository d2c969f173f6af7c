"""`SlotTable`, whose rows come, go and move, against a plain table that has them all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from strategies import generator, normal, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.embedding import SlotTable, StaticTable, TableSpec
from npu_rec.embedding.placement import BlockPlacement, HashPlacement, PlacementName
from npu_rec.embedding.slots import SlotPolicy
from npu_rec.errors import TrainingError
from npu_rec.ops import RowOptimizer
from npu_rec.ops.row_optimizer import RowOptimizerName

Below = Literal["host", "disk"] | None

DIM, ROWS, STEPS, BATCH = 6, 300, 25, 40
SPEC = TableSpec("items", ROWS, DIM, seed=5)
KEYS = torch.randint(
    -(2**63), 2**63 - 1, (ROWS,), generator=generator(1)
)  # of a dynamic table, by row of the plain one
OPTIMIZERS: tuple[RowOptimizerName, ...] = ("sgd", "rowwise_adagrad", "rowwise_adam")
LRU = SlotPolicy(limit=64, eviction="lru")
LFU = SlotPolicy(limit=64, eviction="lfu")


def optimizer(name: RowOptimizerName) -> RowOptimizer:
    return RowOptimizer(name, lr=0.05, betas=(0.9, 0.99), eps=1e-3)


def dynamic(policy: SlotPolicy | None = None, below: Below = None, rank: int = 0, ranks: int = 1) -> SlotTable:
    spec = TableSpec("items", None, DIM, seed=5)
    return SlotTable(spec, HashPlacement(DIM, ranks), rank, policy=policy, below=below)


def tiered(policy: SlotPolicy, below: Below, rank: int = 0, ranks: int = 1) -> SlotTable:
    return SlotTable(SPEC, BlockPlacement("row_wise", ROWS, DIM, ranks), rank, policy=policy, below=below)


def plain(name: RowOptimizerName, first_rows: Tensor) -> StaticTable:
    """All rows in one memory."""
    table = StaticTable(TableSpec("plain", len(first_rows), DIM, seed=0), BlockPlacement("row_wise", ROWS, DIM, 1))
    with torch.no_grad():
        table.weight.copy_(first_rows)
    table.use(optimizer(name))
    return table


def batches(steps: Iterable[int], low: int = 0, high: int = ROWS) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each step its number, rows `[T]` (some several times, in one step none) and their gradients `[T, D]`."""
    for step in steps:
        seed = generator(100 + step)
        size = 0 if step == 3 else BATCH
        yield step, torch.randint(low, high, (size,), generator=seed), normal(seed, size, DIM)


def train(table: StaticTable | SlotTable, step: int, ids: Tensor, grad: Tensor) -> Tensor:
    """One step; the rows `[T, D]` that it read."""
    slots, changes = table.plan(ids, torch.ones_like(ids), step)
    rows: Tensor = table.rows(slots, changes)  # type: ignore[arg-type]  # each its own kind of changes
    rows.backward(grad)
    return rows.detach()


def state_of(table: SlotTable) -> dict[str, Tensor]:
    """All that `export` gives, by id."""
    pieces = list(table.export())
    ids = torch.cat([ids for ids, _ in pieces])
    order = ids.argsort()
    names = pieces[0][1]
    return {"ids": ids[order], **{n: torch.cat([columns[n] for _, columns in pieces])[order] for n in names}}


def opened(table: SlotTable, name: RowOptimizerName, folder: Path) -> SlotTable:
    table.use(optimizer(name))
    table.open_tier(folder)
    return table


def used(table: SlotTable) -> RowOptimizer:
    assert table.optimizer is not None
    return table.optimizer


# --- the same rows as a plain table

FORMS: dict[str, Any] = {
    "grows": lambda: dynamic(),
    "host, lru": lambda: dynamic(LRU, "host"),
    "host, lfu": lambda: dynamic(LFU, "host"),
    "disk": lambda: dynamic(LRU, "disk"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_dynamic_table_learns_what_a_plain_one_learns(form: str, name: RowOptimizerName, tmp_path: Path) -> None:
    table, reference = opened(FORMS[form](), name, tmp_path), plain(name, SPEC.initial_rows(KEYS))
    seen: set[int] = set()
    sizes = set()
    for step, rows, grad in batches(range(1, STEPS)):
        read = train(table, step, KEYS[rows], grad)
        assert torch.equal(read, train(reference, step, rows, grad))
        seen |= set(rows.tolist())
        sizes.add(len(table.weight))
    assert torch.equal(table.read(KEYS), reference.weight)  # those never seen have their initial row
    found = state_of(table)
    rows = torch.tensor(sorted(seen, key=lambda row: int(KEYS[row])))
    assert torch.equal(found["ids"], KEYS[rows])
    assert torch.equal(found["weight"], reference.weight[rows])
    assert reference.optimizer is not None
    assert used(table).step == reference.optimizer.step == STEPS - 1
    for key in ("square", "momentum"):
        expected = getattr(reference.optimizer, key)
        assert (key in found) == (expected is not None)
        if expected is not None:
            assert torch.equal(found[key], expected[rows])
    if form == "grows":
        assert len(sizes) > 3
        return
    assert max(sizes) == 64
    values = table.counters()
    assert values["rows"] <= 64
    assert values["evicted"] > 200
    assert values["bytes_read"] > 0
    assert values["bytes_written"] == values["evicted"] * table.weight.element_size() * (
        DIM + {"sgd": 0, "rowwise_adagrad": 1, "rowwise_adam": 1 + DIM}[name]
    )


@pytest.mark.parametrize("below", ["host", "disk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_block_of_a_tiered_table_learns_what_a_plain_one_learns(
    name: RowOptimizerName, below: Below, tmp_path: Path
) -> None:
    table = opened(tiered(LRU, below, rank=1, ranks=2), name, tmp_path)
    reference = plain(name, SPEC.initial_rows(torch.arange(ROWS)))
    for step, ids, grad in batches(range(1, STEPS), low=ROWS // 2):
        assert torch.equal(train(table, step, ids, grad), train(reference, step, ids, grad))
    own = torch.arange(ROWS // 2, ROWS)
    assert torch.equal(table.read(own), reference.weight[own])
    assert table.counters()["evicted"] > 100
    assert table.owns(torch.arange(ROWS)).nonzero().squeeze(1).tolist() == own.tolist()


def test_hits_and_misses_count_distinct_ids(tmp_path: Path) -> None:
    table = opened(tiered(SlotPolicy(limit=4, eviction="lru"), "host"), "sgd", tmp_path)
    for step, ids in enumerate(([1, 2, 2, 2], [2, 3, 3], [4, 5, 2], [1]), 1):
        train(table, step, torch.tensor(ids), torch.ones(len(ids), DIM))
    # 1 2 | 3 | 4 5 | 1, which was evicted | found: 2, 2
    assert {n: table.counters()[n] for n in ("hits", "misses", "evicted")} == {"hits": 2, "misses": 6, "evicted": 2}


def test_without_a_tier_an_evicted_or_expired_row_starts_anew(tmp_path: Path) -> None:
    for policy in (SlotPolicy(limit=2, eviction="lru"), SlotPolicy(max_age=1)):
        table = opened(dynamic(policy), "rowwise_adam", tmp_path)
        first = train(table, 1, torch.tensor([7]), torch.ones(1, DIM))
        assert not torch.equal(table.read(torch.tensor([7])), first)
        train(table, 2, torch.tensor([8, 9]), torch.ones(2, DIM))
        train(table, 3, torch.tensor([8, 9]), torch.ones(2, DIM))
        slots, changes = table.plan(torch.tensor([7]), torch.ones(1, dtype=torch.int64), 4)
        assert torch.equal(table.rows(slots, changes), first)
        assert torch.equal(first, SPEC.initial_rows(torch.tensor([7])))
        square, momentum = used(table).square, used(table).momentum
        assert square is not None
        assert momentum is not None
        assert not square[slots].any()
        assert not momentum[slots].any()


# --- ids without a row


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_refused_ids_read_their_initial_row_and_are_not_trained(name: RowOptimizerName) -> None:
    table = dynamic(SlotPolicy(min_count=3))
    table.use(optimizer(name))
    reference = plain(name, SPEC.initial_rows(torch.arange(ROWS)))
    first = SPEC.initial_rows(torch.arange(ROWS))
    # (ids, which of them have a row): all refused, mixed, all there, mixed with repeats
    steps = [
        ([5, 6, 5], []),
        ([6, 5, 9], [5]),
        ([5, 5], [5]),
        ([9, 5, 6, 6, 1, 9], [5, 6, 9]),
    ]
    for step, (ids, resident) in enumerate(steps, 1):
        asked, grad = torch.tensor(ids), normal(generator(step), len(ids), DIM)
        has_row = torch.isin(asked, torch.tensor(resident, dtype=torch.int64))
        expected = torch.where(has_row.unsqueeze(1), reference.weight[asked], first[asked])
        train(reference, step, asked[has_row], grad[has_row])
        assert torch.equal(train(table, step, asked, grad), expected)
    assert torch.equal(table.read(torch.arange(ROWS)), reference.weight)
    assert table.counters()["refused"] == 3 + 2 + 0 + 1
    assert table.counters()["waiting"] == 1
    assert state_of(table)["ids"].tolist() == [5, 6, 9]


def test_reading_learns_and_counts_nothing(tmp_path: Path) -> None:
    table = opened(dynamic(SlotPolicy(limit=8, eviction="lru", min_count=2), "host"), "rowwise_adam", tmp_path)
    for step in range(1, 6):
        ids = torch.arange(step, step + 6).repeat(2)
        train(table, step, torch.cat([ids, torch.tensor([100 + step])]), torch.ones(13, DIM))
    asked = torch.tensor([1, 9, 9, 3, 102, 77, 1])  # in the tier, hot, waiting, never seen

    def everything() -> list[Any]:
        counters = {n: v for n, v in table.counters().items() if n != "bytes_read"}
        tables = (table.map.seen, table.map.waiting)
        kept = [x.tolist() for t in tables for x in (*t.map.items(), t.last_step, t.count)]
        return [counters, kept, used(table).step, {n: x.tolist() for n, x in state_of(table).items()}]

    before = everything()
    rows = table.read(asked)
    assert everything() == before
    state = state_of(table)
    for id_, row in zip(asked.tolist(), rows, strict=True):
        where = (state["ids"] == id_).nonzero()
        expected = state["weight"][where[0, 0]] if len(where) else SPEC.initial_rows(torch.tensor([id_]))[0]
        assert torch.equal(row, expected)
        assert bool(len(where)) == (id_ < 12)
    assert table.read(asked[:0]).shape == (0, DIM)


def test_the_first_step_may_ask_for_nothing_and_admit_nobody() -> None:
    for policy in (SlotPolicy(), SlotPolicy(min_count=2)):
        table = dynamic(policy)
        table.use(optimizer("rowwise_adam"))
        assert train(table, 1, torch.zeros(0, dtype=torch.int64), torch.zeros(0, DIM)).shape == (0, DIM)
        assert torch.equal(train(table, 2, KEYS[:1], torch.ones(1, DIM)), SPEC.initial_rows(KEYS[:1]))
        assert used(table).step == 2  # as of a table in which the ids have rows


def test_a_step_beyond_the_limit_says_so(tmp_path: Path) -> None:
    table = opened(tiered(SlotPolicy(limit=4, eviction="lfu"), "host"), "sgd", tmp_path)
    with pytest.raises(TrainingError, match=r"table items: 0 rows and 5 new ones .* 4 rows .*; raise it, or make"):
        train(table, 1, torch.arange(5), torch.ones(5, DIM))


# --- export and load


def trained(name: RowOptimizerName, below: Below, folder: Path) -> SlotTable:
    table = opened(dynamic(LRU, below) if below else dynamic(), name, folder)
    for step, rows, grad in batches(range(1, 12)):
        train(table, step, KEYS[rows], grad)
    return table


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [None, "host", "disk"])
@pytest.mark.parametrize("after", [None, "host", "disk"])
def test_rows_and_their_state_survive_export_and_load(
    before: Below, after: Below, name: RowOptimizerName, tmp_path: Path
) -> None:
    table = trained(name, before, tmp_path / "old")
    loaded = opened(dynamic(LRU, after) if after else dynamic(), name, tmp_path / "new")
    loaded.load(table.export())
    old, new = state_of(table), state_of(loaded)
    assert len(old["ids"]) > 200
    for key in set(old) - {"last_step", "count"}:
        assert torch.equal(new[key], old[key]), key
    if before is None and after is None:
        assert torch.equal(new["last_step"], old["last_step"])
        assert torch.equal(new["count"], old["count"])
    used(loaded).step = used(table).step
    for step, rows, grad in batches(range(12, 20)):
        assert torch.equal(train(loaded, step, KEYS[rows], grad), train(table, step, KEYS[rows], grad))
    assert torch.equal(loaded.read(KEYS), table.read(KEYS))


def test_each_rank_loads_its_own_rows(tmp_path: Path) -> None:
    table = trained("rowwise_adam", "host", tmp_path)
    whole = state_of(table)
    parts = [opened(dynamic(rank=rank, ranks=3), "rowwise_adam", tmp_path) for rank in range(3)]
    for part in parts:
        part.load(table.export())
    states = [state_of(part) for part in parts]
    together = torch.cat([state["ids"] for state in states])
    assert all(len(state["ids"]) > 50 for state in states)
    order = together.argsort()
    assert torch.equal(together[order], whole["ids"])
    for key in ("weight", "square", "momentum"):
        assert torch.equal(torch.cat([state[key] for state in states])[order], whole[key])
    alone = opened(dynamic(), "rowwise_adam", tmp_path)  # and one rank those of three
    alone.load(piece for part in parts for piece in part.export())
    assert {n: x.tolist() for n, x in state_of(alone).items() if n not in ("last_step", "count")} == {
        n: x.tolist() for n, x in whole.items() if n not in ("last_step", "count")
    }


def test_without_a_tier_a_table_takes_more_rows_than_its_limit_and_then_keeps_it(tmp_path: Path) -> None:
    table = trained("rowwise_adagrad", "host", tmp_path)
    evaluated = dynamic(LRU, "host")  # an evaluation has no optimiser and opens no tier
    evaluated.load(table.export())
    assert torch.equal(evaluated.read(KEYS), table.read(KEYS))
    loaded = opened(dynamic(LRU), "rowwise_adagrad", tmp_path)
    loaded.load(table.export())
    assert loaded.counters()["rows"] > 200
    train(loaded, 12, torch.arange(5), torch.ones(5, DIM))
    assert loaded.counters()["rows"] == 64


@pytest.mark.parametrize("below", [None, "host", "disk"])
def test_loading_replaces_what_a_table_has_learnt(below: Below, tmp_path: Path) -> None:
    table = trained("rowwise_adam", below, tmp_path)
    kept = [(ids.clone(), {n: x.clone() for n, x in columns.items()}) for ids, columns in table.export()]
    before = table.read(KEYS)
    for step, rows, grad in batches(range(12, 30)):
        train(table, step, KEYS[rows], grad)
    assert not torch.equal(table.read(KEYS), before)
    table.load(kept)
    assert torch.equal(table.read(KEYS), before)


def test_rows_of_another_optimiser_come_without_its_state(tmp_path: Path) -> None:
    table = trained("sgd", "host", tmp_path / "old")
    loaded = opened(dynamic(LRU, "host"), "rowwise_adam", tmp_path / "new")
    loaded.load(table.export())
    state = state_of(loaded)
    assert torch.equal(state["weight"], state_of(table)["weight"])
    assert not state["square"].any()
    assert not state["momentum"].any()


def test_while_a_plan_waits_for_its_rows_a_table_answers_nothing_wrong(tmp_path: Path) -> None:
    table = trained("sgd", "host", tmp_path)
    ids, before = KEYS[:40], table.read(KEYS[:40])
    slots, changes = table.plan(ids, torch.ones_like(ids), 12)
    uses: dict[str, Callable[[], object]] = {
        "planned again": lambda: table.plan(ids, torch.ones_like(ids), 13),
        "read": lambda: table.read(ids),
        "exported": lambda: list(table.export()),
    }
    for what, use in uses.items():
        with pytest.raises(RuntimeError, match=f"table items is {what} before the rows of its last plan were looked"):
            use()
    assert torch.equal(table.rows(slots, changes), before)
    assert torch.equal(table.read(ids), before)


# --- memory


def bytes_of(table: SlotTable) -> int:
    """Tensors and maps of a table, on device and host."""
    state = (used(table).square, used(table).momentum)
    tensors = [table.weight, *(x for x in state if x is not None)]
    maps = [table.map.seen, table.map.waiting]
    tensors += [x for seen in maps for x in (seen.last_step, seen.count)]
    total = sum(x.nbytes for x in tensors) + sum(seen.map.memory_bytes for seen in maps)
    if table.tier is not None:
        total += table.tier.map.memory_bytes + table.tier.store.memory_bytes
    return total


@pytest.mark.parametrize("below", [None, "host", "disk"])
def test_memory_is_that_of_the_rows_touched(below: Below, tmp_path: Path) -> None:
    declared, dim = 10**8, 16
    touched = 2 * 10**5 if below != "disk" else 2 * 10**4  # rows far apart take a page of the disk each
    spec = TableSpec("items", declared, dim, seed=5)
    placement = BlockPlacement("row_wise", declared, dim, 1)
    policy = SlotPolicy() if below is None else SlotPolicy(limit=6_000, eviction="lru")
    table = opened(SlotTable(spec, placement, policy=policy, below=below), "rowwise_adagrad", tmp_path)
    ids = torch.randint(0, declared, (touched,), generator=generator(0)).unique()
    assert len(ids) > 0.99 * touched
    for step, some in enumerate(ids[torch.randperm(len(ids), generator=generator(1))].split(5_000), 1):
        train(table, step, some, torch.ones(len(some), dim))
    record = (dim + 1) * 4
    everything = {None: 4 * len(ids) * (record + 16 + 16), "host": 2 * len(ids) * (record + 32), "disk": 0}[below]
    slots = 0 if below is None else 6_000 * (record + 16 + 64)
    bits = declared // 8 if below == "disk" else 0
    assert len(ids) * record * (below != "disk") < bytes_of(table) < everything + slots + bits + 100_000
    if below == "disk":
        (file,) = tmp_path.glob("*.rows")
        assert file.stat().st_size == declared * record
        assert file.stat().st_blocks * 512 < 2 * len(ids) * 4096
        os.truncate(file, 0)  # what is not on the disk yet need not come there
    table.close()


# --- where rows start


def test_initial_rows_depend_on_id_and_name_alone() -> None:
    whole = StaticTable(SPEC, BlockPlacement("row_wise", ROWS, DIM, 1)).weight
    table = dynamic()
    for step, ids in enumerate(torch.randperm(ROWS, generator=generator(2)).split(37), 1):
        slots, changes = table.plan(ids, torch.ones_like(ids), step)
        assert torch.equal(table.rows(slots, changes), whole[ids])
    other = TableSpec("users", ROWS, DIM, seed=5).initial_rows(torch.arange(ROWS))
    assert torch.isclose(other, whole).float().mean() < 0.01


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["row_wise", "column_wise", "table_wise"])
def test_blocks_of_ranks_make_up_a_table(kind: PlacementName, ranks: int) -> None:
    for rows, dim in ((ROWS, DIM), (2, 5), (0, 1)):
        placement = BlockPlacement(kind, rows, dim, ranks, owner=ranks - 1)
        holders = torch.zeros(rows, dim)
        for rank in range(ranks):
            block = placement.block(rank)
            assert placement.width(rank) == block.columns
            holders[block.first_row : block.last_row, block.first_column : block.last_column] += 1
        assert bool((holders == 1).all())
        ids = torch.arange(0, rows, 3)
        places, counts = placement.ask(ids)
        for rank, asked in enumerate(ids[places].split(counts)):
            block = placement.block(rank)
            assert bool(((asked >= block.first_row) & (asked < block.last_row)).all()) or block.columns == 0


def test_keys_are_spread_evenly_over_ranks_and_asked_of_their_owner() -> None:
    for ranks in (1, 2, 3, 8):
        placement = HashPlacement(DIM, ranks)
        for ids in (torch.arange(24_000), torch.arange(24_000) * 1024 - 2**50):
            places, counts = placement.ask(ids)
            assert max(abs(count - 24_000 / ranks) for count in counts) < 5 * (24_000 / ranks) ** 0.5
            owners = placement.owner_of(ids[places])
            assert torch.equal(owners, torch.arange(ranks).repeat_interleave(torch.tensor(counts)))
