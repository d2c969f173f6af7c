"""What one rank of test_embedding_ranks.py does, in a process of its own.

As a program it finds RANK, WORLD_SIZE and MEETING_POINT set. Beside the meeting point it leaves `rank-<r>.pt`: what
`Case.run` gives, by name of the case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from strategies import generator, normal
from torch import Tensor

from npu_rec.config import EmbeddingConfig
from npu_rec.device import get_device
from npu_rec.distributed import World, open_world
from npu_rec.distributed.world import ALONE
from npu_rec.embedding import EmbeddingCollection, EmbeddingTable, SlotTable, StaticTable, TableSpec, build_tables
from npu_rec.errors import ConfigError
from npu_rec.ops import RowOptimizer
from npu_rec.ops.row_optimizer import RowOptimizerName

Results = dict[str, Tensor]

SPECS = (
    TableSpec("items", 50, 4, seed=1, std=1.0),
    TableSpec("users", 7, 6, seed=2, std=1.0),
    TableSpec("tiny", 2, 3, seed=3, std=1.0),  # fewer rows than ranks, and on four ranks fewer columns
)
STEPS = 7
LR = 0.05
COLLECTIVES = ("all_to_all_single", "all_reduce", "all_gather_object", "all_gather", "broadcast", "barrier")


@dataclass(frozen=True)
class Case:
    """Tables and how they are trained."""

    placement: Literal["row_wise", "table_wise", "column_wise"] = "row_wise"
    optimizer: RowOptimizerName | Literal["dense"] = "sgd"
    kind: Literal["static", "dynamic"] = "static"
    tier: Literal["device", "host", "disk"] = "device"
    replicas: int = 1
    admission: bool = False
    max_norm: float | None = None
    dtype: torch.dtype = torch.float64
    tables: int = 3

    def config(self, ranks: int) -> EmbeddingConfig:
        replicas = self.replicas if ranks > 1 else 1
        values: dict[str, Any] = {"placement": self.placement, "optimizer": self.optimizer, "kind": self.kind}
        if self.tier != "device":
            values |= {"tier": self.tier, "rows": 30 * replicas // ranks + 5, "eviction": "lru"}
        if self.admission:
            values |= {"admission_count": 3, "admission_probability": 0.8, "max_age": 2}
        return EmbeddingConfig(**values, replicas=replicas)

    def build(self, world: World, folder: Path) -> EmbeddingCollection:
        tables = build_tables(SPECS[: self.tables], self.config(world.size), world=world)
        for table in tables.tables.values():
            table.to(self.dtype)
            if self.optimizer != "dense":
                table.use(RowOptimizer(self.optimizer, lr=LR, betas=(0.9, 0.99), eps=1e-3, max_norm=self.max_norm))
                table.open_tier(folder / f"rank-{world.rank}")
        return tables

    def keys(self, spec: TableSpec) -> Tensor:
        """All ids of a table."""
        rows = spec.num_rows or 0
        if self.kind == "static":
            return torch.arange(rows)
        return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator(spec.seed))

    def batch(self, step: int, world: World) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Of each table all ids `[n]`, the gradients of their rows `[n, D]`, and which `[m]` are this rank's."""
        found = {}
        for i, spec in enumerate(SPECS[: self.tables]):
            seed = generator(1000 * step + i)
            count = 0 if (step, i) == (3, 1) else 30
            ids = self.keys(spec)[torch.randint(0, spec.num_rows or 0, (count,), generator=seed)]
            grads = normal(seed, count, spec.dim).to(self.dtype)
            owner = torch.randint(0, 2**30, (count,), generator=seed) % world.size
            if step == 2 and world.size > 1:  # the first rank has nothing
                owner = 1 + owner % (world.size - 1)
            if step == 5:  # and all but it
                owner = torch.zeros_like(owner)
            found[spec.name] = ids, grads, (owner == world.rank).nonzero().squeeze(1)
        return found

    def run(self, world: World, folder: Path) -> Results:
        """Train, each step planned by a thread during the one before.

        Returns:
            `looked.<table>` the rows that this rank read, `[STEPS, n, D]` with zeros for those of other ranks;
            `read.<table>` all rows in the end; `own.<table>...` what this rank holds; `collectives`, how many.
        """
        tables = self.build(world, folder)
        results: dict[str, list[Tensor]] = {}
        with counting() as calls, ThreadPoolExecutor(1) as planner:
            planned = planner.submit(tables.plan, self._ids(1, world))
            for step in range(1, STEPS + 1):
                rows = tables.lookup(planned.result())
                if step < STEPS:
                    planned = planner.submit(tables.plan, self._ids(step + 1, world))
                loss = torch.zeros((), dtype=self.dtype)
                for name, (ids, grads, mine) in self.batch(step, world).items():
                    loss = loss + (rows[name] * grads[mine]).sum()
                    looked = torch.zeros(len(ids), rows[name].shape[1], dtype=self.dtype)
                    looked[mine] = rows[name].detach()
                    results.setdefault(f"looked.{name}", []).append(looked)
                loss.backward()
                self._descend(tables)
        found = {name: torch.cat(parts) for name, parts in results.items()}
        found["collectives"] = torch.tensor([calls[name] for name in COLLECTIVES])
        for spec in SPECS[: self.tables]:
            wanted, table = self.keys(spec), tables.tables[spec.name]
            found |= {f"own.{spec.name}.{key}": x for key, x in held(table).items()}
            found[f"read.{spec.name}"] = tables.read(spec.name, wanted.repeat(1 + world.rank))[-len(wanted) :]
            table.close()
        return {name: x.detach().clone() for name, x in found.items()}

    def _ids(self, step: int, world: World) -> dict[str, Tensor]:
        return {name: ids[mine] for name, (ids, _, mine) in self.batch(step, world).items()}

    def _descend(self, tables: EmbeddingCollection) -> None:
        """SGD of an ordinary parameter."""
        if self.optimizer != "dense":
            return
        with torch.no_grad():
            for table in tables.tables.values():
                assert isinstance(table, StaticTable)
                assert table.weight.grad is not None
                table.weight.sub_(LR * table.weight.grad)
                table.weight.grad = None


OPTIMIZERS: tuple[RowOptimizerName | Literal["dense"], ...] = ("dense", "sgd", "rowwise_adagrad", "rowwise_adam")
CASES = {
    **{
        f"{placement}, {optimizer}": Case(placement, optimizer)
        for placement in ("row_wise", "table_wise", "column_wise")
        for optimizer in OPTIMIZERS
    },
    **{f"dynamic, {optimizer}": Case("row_wise", optimizer, "dynamic") for optimizer in OPTIMIZERS[1:]},
    "one table": Case(tables=1),
    "row_wise, clipped": Case(optimizer="rowwise_adagrad", max_norm=0.7),
    "column_wise, clipped": Case("column_wise", "rowwise_adagrad", max_norm=0.7),
    "dynamic, admission": Case(optimizer="rowwise_adam", kind="dynamic", admission=True),
    "dynamic, host": Case(optimizer="rowwise_adam", kind="dynamic", tier="host", dtype=torch.float32),
    "float32": Case(optimizer="rowwise_adagrad", dtype=torch.float32),
    "host": Case(optimizer="rowwise_adam", tier="host", dtype=torch.float32),
    "disk": Case(optimizer="rowwise_adagrad", tier="disk", dtype=torch.float32),
}
_REPLICATED = (
    *("row_wise, dense", "row_wise, rowwise_adam", "table_wise, rowwise_adagrad", "column_wise, rowwise_adam"),
    *("dynamic, rowwise_adagrad", "dynamic, admission", "disk", "one table"),
)
REPLICATED = {f"{name}, replicas": replace(CASES[name], replicas=2) for name in _REPLICATED}


def held(table: EmbeddingTable) -> Results:
    """What this rank has of a table: rows and state, and what it counts."""
    found: Results = {}
    if isinstance(table, SlotTable):
        pieces = list(table.export())
        order = torch.cat([ids for ids, _ in pieces]).argsort()
        for key in pieces[0][1]:
            found[key] = torch.cat([columns[key] for _, columns in pieces])[order]
        found["ids"] = torch.cat([ids for ids, _ in pieces])[order]
    else:
        found = {key: values for key, (values, _, _) in table.shards().items()}
    if table.optimizer is not None:
        found["step"] = torch.tensor(table.optimizer.step)
    return found | {f"count of {key}": torch.tensor(value) for key, value in table.counters().items()}


@contextmanager
def counting() -> Iterator[Mapping[str, int]]:
    """Calls of each collective, in all threads."""
    calls, originals = dict.fromkeys(COLLECTIVES, 0), {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return originals[name](*arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def refusals(world: World) -> Results:
    """Whether groups that do not come out even, and ids beyond a table, are errors: `[2]` bool."""
    found = []
    try:
        build_tables(SPECS, EmbeddingConfig(optimizer="sgd", replicas=world.size + 1), world=world)
        found.append(False)
    except ConfigError as error:
        found.append(f"{world.size} ranks cannot be divided into {world.size + 1} equal groups" in str(error))
    tables = build_tables(SPECS, EmbeddingConfig(optimizer="sgd"), world=world)
    for wrong in (-1, 50):
        try:
            tables.plan({"items": torch.tensor([3, wrong])})
            found.append(False)
        except IndexError as error:
            found.append(str(error).startswith("table items: ids reach from ") and "of 50 rows" in str(error))
    return {"refused": torch.tensor(found)}


def rank_process(rank: int, count: int, meeting_point: Path) -> None:
    """One of `count` processes started by a function call."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MEETING_POINT=str(meeting_point))
    main()


def main() -> None:
    meeting_point = Path(os.environ["MEETING_POINT"])
    torch.set_num_threads(1)
    folder = meeting_point.parent
    with open_world(get_device("cpu"), timeout=60.0, init_method=f"file://{meeting_point}") as world:
        cases = CASES if world.size % 2 else CASES | REPLICATED
        results = {name: case.run(world, folder / name) for name, case in cases.items()}
        results["refusals"] = refusals(world)
        torch.save(results, folder / f"rank-{world.rank}.pt")


def run_alone(case: Case, folder: Path) -> Results:
    """The same in one process."""
    return case.run(ALONE, folder)


if __name__ == "__main__":
    main()
