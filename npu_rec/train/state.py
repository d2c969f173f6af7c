"""A task's weights and the state of its optimisers as a checkpoint holds them, whatever part of them this rank has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from npu_rec.embedding import EmbeddingTable, SlotTable
from npu_rec.errors import CheckpointError
from npu_rec.tasks import Task
from npu_rec.train.checkpoint import Checkpoint, Keyed, Shard

Parts = dict[str, Shard]


def tables_of(task: Task) -> list[tuple[str, EmbeddingTable]]:
    """Tables by the name of their module."""
    return [(name, module) for name, module in task.named_modules() if isinstance(module, EmbeddingTable)]


def weight_parts(task: Task) -> Parts:
    """What this rank holds of every weight, by name."""
    values = task.state_dict()
    parts = {name: Shard.of(value) for name, value in values.items()}
    for name, table in tables_of(task):
        whole = f"{name}.weight"
        if not isinstance(values.get(whole), DTensor):  # a replicated table that FSDP shards is none of ours
            shards = table.shards()
            if shards:
                parts[whole] = Shard(*shards["weight"])
    return parts


def optimizer_parts(task: Task, optimizer: torch.optim.Optimizer) -> Parts:
    """State of the optimisers: `<parameter>/<state>`."""
    weights, parts = weight_parts(task), {}
    for name, parameter in task.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            whole = not isinstance(value, DTensor) and value.shape == weights[name].local.shape and value.dim() > 0
            place = (weights[name].offsets, weights[name].shape)
            parts[f"{name}/{key}"] = Shard(value, *place) if whole else Shard.of(value)
    for name, table in tables_of(task):
        if table.optimizer is not None:
            state = {key: Shard(*part) for key, part in table.shards().items() if key != "weight"}
            state["step"] = Shard.of(torch.tensor(table.optimizer.step))
            parts |= {f"{name}.weight/{key}": part for key, part in state.items()}
    return parts


def keyed_rows(task: Task) -> dict[str, Iterator[Keyed]]:
    """Rows of tables that are known by id; those of replicas once."""
    own = task.tables.replicas.is_first
    rows: dict[str, Iterator[Keyed]] = {}
    for name, table in tables_of(task):
        if isinstance(table, SlotTable):
            rows[f"model.{name}"] = _pieces(table) if own else iter(())
            rows[f"waiting.{name}"] = _waiting(table) if own else iter(())
        if table.touched is not None:
            ids = table.touched.ids()
            rows[f"touched.{name}"] = iter([Keyed(ids if own else ids[:0], {})])
    return rows


def _pieces(table: SlotTable) -> Iterator[Keyed]:
    return (Keyed(ids, columns) for ids, columns in table.export())


def touched_rows(task: Task) -> dict[str, Keyed]:
    """The rows of tables that training looked up since the last call, as they are now; those of replicas once."""
    rows = {}
    for name, table in tables_of(task):
        if table.touched is not None:
            ids = table.touched.take()
            if not task.tables.replicas.is_first:
                ids = ids[:0]
            rows[f"model.{name}"] = Keyed(ids, {"weight": table.read(ids).cpu()})
    return rows


def _waiting(table: SlotTable) -> Iterator[Keyed]:
    waiting = table.map.waiting
    ids, slots = waiting.map.items()
    yield Keyed(ids, {"last_step": waiting.last_step[slots], "count": waiting.count[slots]})


def load_weights(task: Task, source: Checkpoint | Mapping[str, Tensor], name: str, *, new_run: bool = False) -> None:
    """Load weights by name.

    Args:
        source: a checkpoint, or whole tensors on the host.
        name: what errors call it.
        new_run: rows by id come without the state of their optimiser, as if no step had used them.

    Raises:
        CheckpointError: names or shapes differ; they are named.
    """
    parts = weight_parts(task)
    if isinstance(source, Checkpoint):
        shapes = {n.removeprefix("model."): source.shape_of(n) for n in source.names if n.startswith("model.")}
    else:
        shapes = {n: tuple(value.shape) for n, value in source.items()}
    problems = [f"missing {n}" for n in parts if n not in shapes]
    problems += [f"unknown {n}" for n in shapes if n not in parts]
    problems += [
        f"{n} is {list(shapes[n])}, the model wants {list(part.shape)}"
        for n, part in parts.items()
        if n in shapes and shapes[n] != part.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{name}: does not fit the model: {'; '.join(problems[:4])}{more}")
    with torch.no_grad():
        if isinstance(source, Checkpoint):
            _fill(source, "model", parts)
        else:
            for n, part in parts.items():
                part.local.copy_(source[n][_block(part)])
    for table_name, table in tables_of(task):
        if isinstance(table, SlotTable):
            if not isinstance(source, Checkpoint) or f"model.{table_name}" not in source.keyed_names:
                raise CheckpointError(f"{name}: holds no rows by id of {table_name}, which the model wants")
            pieces = source.keyed(f"model.{table_name}")
            table.load((keyed.keys, _unused(keyed.columns) if new_run else keyed.columns) for keyed in pieces)
    task.train(task.training)  # what tasks keep of their weights in evaluation is out of date


def _unused(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    zeros = torch.zeros_like(columns["last_step"])
    return {"weight": columns["weight"], "last_step": zeros, "count": zeros.clone()}


def load_optimizers(task: Task, optimizer: torch.optim.Optimizer, source: Checkpoint) -> None:
    """Put back the state of `optimizer_parts`, which ids wait for a row, and which a delta is due for."""
    weights, trained = weight_parts(task), {p for group in optimizer.param_groups for p in group["params"]}
    stored = [name.removeprefix("optimizer.") for name in source.names if name.startswith("optimizer.")]
    parts: Parts = {}
    for name, parameter in task.named_parameters():
        for full in (n for n in stored if n.rpartition("/")[0] == name and parameter in trained):
            key, weight = full.rpartition("/")[2], weights[name]
            if not source.shape_of(f"optimizer.{full}"):
                optimizer.state[parameter][key] = source.read(f"optimizer.{full}", (), ())
                continue
            optimizer.state[parameter][key] = value = torch.zeros_like(parameter)
            local = value.to_local() if isinstance(value, DTensor) else value
            parts[full] = Shard(local.detach(), weight.offsets, weight.shape)
    for name, table in tables_of(task):
        if table.optimizer is not None:
            table.optimizer.step = int(source.read(f"optimizer.{name}.weight/step", (), ()))
            state = {key: Shard(*part) for key, part in table.shards().items() if key != "weight"}
            parts |= {f"{name}.weight/{key}": part for key, part in state.items()}
        if isinstance(table, SlotTable):
            for keyed in source.keyed(f"waiting.{name}"):
                own = table.owns(keyed.keys)
                table.map.waiting.insert(keyed.keys[own], keyed.columns["last_step"][own], keyed.columns["count"][own])
        if table.touched is not None and f"touched.{name}" in source.keyed_names:
            for keyed in source.keyed(f"touched.{name}"):
                table.touched.add(keyed.keys[table.owns(keyed.keys)])
    _fill(source, "optimizer", parts)


def _fill(source: Checkpoint, prefix: str, parts: Parts) -> None:
    """Read blocks into the memory of their values."""
    host = {
        name: Shard(torch.empty(part.local.shape, dtype=part.local.dtype), part.offsets, part.shape)
        for name, part in parts.items()
    }
    source.fill({f"{prefix}.{name}": part for name, part in host.items()})
    with torch.no_grad():
        for name, part in parts.items():
            part.local.copy_(host[name].local)


def _block(part: Shard) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(part.offsets, part.local.shape, strict=True))
