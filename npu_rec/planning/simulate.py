"""One rank of many, built and trained for a step without data: what it holds and what it sends.

Nothing here is estimated by formula but the rows of tables without a fixed number of them: the task, its tables, DDP
or FSDP2, the optimisers and the step are those of training, on tensors that have shapes alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from npu_rec.config import Config
from npu_rec.device import get_device
from npu_rec.distributed import World
from npu_rec.distributed.mirror import Message, Mirror, close_mirror, open_mirror
from npu_rec.distributed.world import ALONE, asked_size
from npu_rec.embedding import SlotTable, StaticTable
from npu_rec.errors import ConfigError
from npu_rec.ops import RowOptimizer
from npu_rec.planning.size import Load, imagined_batch
from npu_rec.planning.tables import TableParts, table_parts
from npu_rec.planning.tensors import Ledger, imagined
from npu_rec.tasks import DataFacts, Prepared, Task, build_task
from npu_rec.train.optim import build_optimizer, row_learning_rate
from npu_rec.train.parallel import DenseParallel
from npu_rec.train.step import Stepper


@dataclass(frozen=True)
class Memory:
    """Bytes on one card.

    Attributes:
        tables, table_states: rows of the embedding tables, and what their optimisers keep.
        parameters, optimizer_states: all other parameters (and constant tensors), and what AdamW keeps.
        gradients: of everything that AdamW trains.
        activations: what the forward pass leaves for the backward pass.
        buffers: the batch with its plan, and the buckets in which DDP sums gradients.
        peak: at the fullest moment of a step. Not the sum: activations go while gradients come, and operators have
            tensors of their own for a while.
    """

    tables: int
    table_states: int
    parameters: int
    optimizer_states: int
    gradients: int
    activations: int
    buffers: int
    peak: int


@dataclass(frozen=True)
class Rank:
    """One simulated rank.

    Attributes:
        messages: what it sends in one optimiser step.
        tables: what all ranks hold of the tables.
        parameters: of the model outside the tables.
        tokens: of a step.
        flops: of a step, forward and backward.
    """

    rank: int
    ranks: int
    memory: Memory
    messages: list[Message]
    tables: list[TableParts]
    parameters: int
    tokens: int
    flops: float


TOKENS = 1 << 14  # of a step; with more, two smaller ones are simulated


def simulate(config: Config, facts: DataFacts, load: Load, *, rank: int, ranks: int, ranks_per_node: int) -> Rank:
    """Build rank `rank` of `ranks` and let it take an optimiser step.

    Drawing and planning are done for real, which takes long for millions of tokens. So where there are more than
    `TOKENS`, steps with as many sequences as that allows and with half of them are simulated, and what they need and
    send is continued in a straight line.

    Raises:
        ConfigError: the configuration cannot be built so, or this process is a rank of something already.
        TrainingError: a step does not fit into `embedding.rows`.
    """
    many = TOKENS // load.length
    if load.sequences <= max(many, 2):
        return _simulated(config, facts, load, rank, ranks, ranks_per_node)
    few, more = (
        _simulated(config, facts, replace(load, sequences=n), rank, ranks, ranks_per_node)
        for n in (max(1, many // 2), max(2, many))
    )
    return _continued(few, more, (max(1, many // 2), max(2, many), load.sequences))


def _continued(few: Rank, more: Rank, sequences: tuple[int, int, int]) -> Rank:
    """On a line through two points, the third."""
    a, b, c = sequences

    def line(x: float, y: float) -> float:
        return y + (y - x) * (c - b) / (b - a)

    sizes = {name: int(line(x, getattr(more.memory, name))) for name, x in vars(few.memory).items()}
    messages = [
        replace(
            y,
            within_node=line(x.within_node, y.within_node),
            between_nodes=line(x.between_nodes, y.between_nodes),
        )
        for x, y in zip(few.messages, more.messages, strict=True)
    ]
    tokens, flops = int(line(few.tokens, more.tokens)), line(few.flops, more.flops)
    return replace(more, memory=Memory(**sizes), messages=messages, tokens=tokens, flops=flops)


def _simulated(config: Config, facts: DataFacts, load: Load, rank: int, ranks: int, ranks_per_node: int) -> Rank:
    if config.embedding.engine == "torchrec":
        raise ConfigError("embedding.engine: TorchRec places its tables itself; plan with engine native")
    if asked_size() > 1 or dist.is_initialized():
        raise ConfigError("a simulated rank needs a process of its own, outside of torchrun")
    messages: list[Message] = []
    with _world(rank, ranks, ranks_per_node, messages) as world:
        return _step(config, facts, load, world, messages)


@contextmanager
def _world(rank: int, ranks: int, ranks_per_node: int, messages: list[Message]) -> Iterator[World]:
    if ranks == 1:
        yield ALONE
        return
    try:
        yield open_mirror(rank, ranks, ranks_per_node, messages.append, lambda x: not isinstance(x, FakeTensor))
    finally:
        close_mirror()


def _step(config: Config, facts: DataFacts, load: Load, world: World, messages: list[Message]) -> Rank:
    def collective(op: str, size: int) -> None:
        assert isinstance(world, Mirror)  # one process alone shards nothing
        world.sent("parameters" if op == "all_gather" else "gradients", op, size, False)

    sharing = config.parallel.context if world.size > 1 else 1
    with torch.device("meta"):
        task = build_task(config, facts, world)
    messages.clear()
    plan = task.prepare(imagined_batch(facts, load, world.rank // sharing, config.train.seed), 0)
    planning = list(messages)
    with imagined(collective) as ledger:
        ledger.materialise(task)
        rows = _row_optimizers(task, config)
        task.train()
        before = ledger.bytes
        dense = DenseParallel(task, config.parallel, world, get_device("cpu"), all_used=facts.has_times)
        buckets = ledger.bytes - before if config.parallel.dense == "ddp" else 0
        optimizer = build_optimizer(task, config.train)
        stepper = Stepper(task, config, world, get_device("cpu"), optimizer, rows, dense)
        _make_states(optimizer)
        messages.clear()
        before, forward = ledger.bytes, [0]
        ledger.reset_peak()
        batches = [_Batch(plan, ledger) for _ in range(load.accumulate)]
        stepper.gradients(batches, config.train.lr, 1, lambda: forward.append(ledger.bytes))  # type: ignore[arg-type]
        optimizer.step()
        held = _held(task, optimizer)
        earlier = held["gradients"] if load.accumulate > 1 else 0  # of the batches before the last
        held |= {"buffers": buckets + batches[-1].bytes, "peak": ledger.peak}
        held["activations"] = forward[-1] - before - batches[-1].bytes - earlier
        parameters = _parameters(task)
    tables = [table_parts(table, facts.num_items, world.size) for table in task.tables.tables.values()]
    for table in tables:
        table.settle(held, world.rank)
    part = load.accumulate / sharing
    return Rank(
        rank=world.rank,
        ranks=world.size,
        memory=Memory(**held),
        messages=planning * load.accumulate + messages,
        tables=tables,
        parameters=parameters,
        tokens=int(part * load.sequences * load.length),
        flops=3.0 * part * task.flops(torch.full((load.sequences,), load.length)),
    )


class _Batch:
    """What the stepper moves to the device when its turn comes.

    Attributes:
        bytes: that it takes there.
    """

    def __init__(self, plan: Prepared, ledger: Ledger) -> None:
        self._plan, self._ledger, self.bytes = plan, ledger, 0

    def to(self, device: torch.device) -> Prepared:
        before = self._ledger.bytes
        moved = _imagine(
            self._plan.to(torch.device("meta")), self._ledger
        )  # only what goes to a device is on meta then
        self.bytes = self._ledger.bytes - before
        assert isinstance(moved, Prepared)
        return moved


def _imagine(value: Any, ledger: Ledger) -> Any:
    """A copy whose tensors on `meta` are on the imagined device."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype) if value.is_meta else value
    if isinstance(value, Mapping):
        return {name: _imagine(inner, ledger) for name, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, World):
        fields = {f.name: _imagine(getattr(value, f.name), ledger) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)  # type: ignore[type-var]
    return value


def _row_optimizers(task: Task, config: Config) -> list[RowOptimizer]:
    optimizers = []
    for table in task.tables.tables.values():
        if config.embedding.optimizer != "dense":
            lr = row_learning_rate(config, config.train.lr)
            optimizers.append(RowOptimizer(config.embedding.optimizer, lr=lr, betas=config.train.betas))
            table.use(optimizers[-1])
    return optimizers


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """What AdamW makes in its first step."""
    for parameters in optimizer.param_groups:
        for parameter in parameters["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _held(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of what lasts from step to step, and of the gradients that are there."""
    tables = list(task.tables.tables.values())
    rows = {table.weight for table in tables if isinstance(table, (StaticTable, SlotTable))}
    updates = [table.optimizer for table in tables if table.optimizer is not None]
    parameters = list(task.parameters())
    states = [(p in rows, x) for p in parameters for x in optimizer.state.get(p, {}).values() if x.dim() > 0]
    others = [x for x in (*parameters, *task.buffers()) if x not in rows]
    return {
        "tables": _bytes(rows),
        "table_states": _bytes(x for update in updates for x in (update.square, update.momentum))
        + _bytes(x for own, x in states if own),
        "parameters": _bytes(others),
        "optimizer_states": _bytes(x for own, x in states if not own),
        "gradients": _bytes(p.grad for p in parameters),
    }


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of the memory that they are in, each piece once."""
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if x is not None]
    pieces = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in local}
    return sum(pieces.values())


def _parameters(task: Task) -> int:
    tables = list(task.tables.tables.values())
    rows = {table.weight for table in tables if isinstance(table, (StaticTable, SlotTable))}
    return sum(p.numel() for p in task.parameters() if p not in rows)  # of a DTensor, the whole
