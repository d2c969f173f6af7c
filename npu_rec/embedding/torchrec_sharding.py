"""TorchRec's own objects for tables: one collection a table, placed, sharded, its update fused in the backward pass."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from npu_rec.device import Device
from npu_rec.distributed import World
from npu_rec.embedding.table import TableSpec
from npu_rec.errors import ConfigError
from npu_rec.ops import RowOptimizer

TorchRecPlacement = Literal["row_wise", "table_wise", "column_wise", "auto"]

_FUSED = {"sgd": "EXACT_SGD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}
_VECTOR = 4  # FBGEMM's rows are as long as a multiple of this
_RESERVED = 0.15  # of the memory: what the planner leaves to the rest of the model


def library(module: str) -> Any:
    """A module of TorchRec or FBGEMM.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"embedding.engine torchrec: {module} cannot be imported ({error}); for torch 2.13: pip install --no-deps "
            "torchrec==1.8.0, then pip install fbgemm-gpu-cpu==1.8.0 (with CUDA fbgemm-gpu==1.8.0) torchmetrics==1.0.3 "
            "tensordict pyre-extensions tqdm; or set embedding.engine to native"
        ) from error


def inner_name(table: str) -> str:
    """A table's name within TorchRec, which makes attributes of names: `items` is one already."""
    return f"table_{table}"


def check_tables(specs: list[TableSpec], placement: str) -> None:
    """Raise ConfigError for tables that this engine does not have."""
    if placement not in get_args(TorchRecPlacement):
        known = ", ".join(get_args(TorchRecPlacement))
        raise ConfigError(f"embedding.placement {placement} needs embedding.engine native; torchrec has {known}")
    for spec in specs:
        if spec.num_rows is None:
            raise ConfigError(f"table {spec.name} is dynamic, which needs embedding.engine native")


def check_optimizer(optimizer: RowOptimizer, placement: TorchRecPlacement) -> None:
    """Raise ConfigError for an update that FBGEMM does not make, or makes with other numbers."""
    if optimizer.name not in _FUSED:
        raise ConfigError(
            f"embedding.optimizer {optimizer.name} needs embedding.engine native: FBGEMM has it for CUDA alone, and "
            "counts lookups of evaluation as steps"
        )
    if optimizer.max_norm is not None:
        raise ConfigError("train.clip row needs embedding.engine native: FBGEMM does not limit the norm of a gradient")
    if placement == "column_wise" and optimizer.name != "sgd":
        raise ConfigError(
            f"embedding.placement column_wise with {optimizer.name} needs embedding.engine native: FBGEMM keeps a sum "
            "for each rank's columns instead of one a row"
        )


def stretch(dim: int, width: int) -> float:
    """What gradients of rows that are `width` wide in FBGEMM are multiplied by, and the learning rate divided by.

    The mean of g^2 over the padded row is then that over its `dim` columns, so that row-wise Adagrad's sum and eps
    mean what they do without padding; in SGD's product the two factors meet.
    """
    return math.sqrt(width / dim)


def padded(dim: int, placement: TorchRecPlacement, ranks: int) -> int:
    """Columns in FBGEMM: whole vectors, equally many on each rank where columns are divided."""
    step = _VECTOR * ranks if placement == "column_wise" else _VECTOR
    return -(-dim // step) * step


def shard(
    specs: list[TableSpec],
    optimizers: Mapping[str, RowOptimizer],
    world: World,
    device: Device,
    place: torch.device,
    placement: TorchRecPlacement,
) -> dict[str, Any]:
    """By `inner_name`, TorchRec's `ShardedEmbeddingCollection` of each table, its rows not filled in. Collective.

    Args:
        optimizers: by name; tables without one are only read.
        place: where the rows are, a device of the kind of `device`.

    Raises:
        ConfigError: the planner finds no place.
    """
    parallel, types = library("torchrec.distributed.model_parallel"), library("torchrec.distributed.types")
    collections = {inner_name(spec.name): _collection(spec, placement, world.size) for spec in specs}
    untrained = RowOptimizer("sgd", lr=0.0)
    sharders = {inner_name(spec.name): _sharder(optimizers.get(spec.name, untrained)) for spec in specs}
    group = _group(world, device)
    tables = nn.ModuleDict(collections)
    if placement == "auto":
        plan = _planned(tables, next(iter(sharders.values())), group, device)
    else:
        plan = types.ShardingPlan(
            {
                name: _placed(name, tables[name], sharders[name], placement, i, group, device)
                for i, name in enumerate(collections)
            }
        )
    sharded = {}
    for name, collection in collections.items():
        model = parallel.DistributedModelParallel(
            nn.ModuleDict({name: collection}),
            env=types.ShardingEnv.from_process_group(group),
            device=place,
            plan=plan,
            sharders=[sharders[name]],
            init_data_parallel=False,
        )
        sharded[name] = model.module[name]
    return sharded


def _collection(spec: TableSpec, placement: TorchRecPlacement, ranks: int) -> nn.Module:
    """The table without memory. Its rows are filled up to equally many on each rank: FBGEMM takes no empty part."""
    assert spec.num_rows is not None
    config = library("torchrec.modules.embedding_configs").EmbeddingConfig(
        name=inner_name(spec.name),
        num_embeddings=max(1, -(-spec.num_rows // ranks)) * ranks,
        embedding_dim=padded(spec.dim, placement, ranks),
        feature_names=[inner_name(spec.name)],
    )
    module: nn.Module = library("torchrec.modules.embedding_modules").EmbeddingCollection(
        tables=[config], device=torch.device("meta")
    )
    return module


def _sharder(optimizer: RowOptimizer) -> Any:
    kind = library("fbgemm_gpu.split_embedding_configs").EmbOptimType[_FUSED[optimizer.name]]
    return library("torchrec.distributed.embedding").EmbeddingCollectionSharder(
        {"optimizer": kind, "learning_rate": optimizer.lr, "eps": optimizer.eps}
    )


def _group(world: World, device: Device) -> dist.ProcessGroup:
    """The ranks; for a process alone a group of one, without which TorchRec does not shard."""
    if world.group is not None:
        return world.group
    if not dist.is_initialized():
        backend = "gloo" if device.is_cpu else f"cpu:gloo,{device.torch_device.type}:{device.collective_backend}"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def _on_this_machine(ranks: int) -> int:
    """How many of the ranks: what the launcher says, else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def _placed(
    name: str,
    collection: nn.Module,
    sharder: Any,
    placement: TorchRecPlacement,
    index: int,
    group: dist.ProcessGroup,
    device: Device,
) -> Any:
    """The plan of table number `index`, with the parts where the native engine has them."""
    plans, ranks = library("torchrec.distributed.sharding_plan"), group.size()
    kernel = library("torchrec.distributed.embedding_types").EmbeddingComputeKernel.FUSED.value
    parts = {
        "row_wise": lambda: plans.row_wise(compute_kernel=kernel),
        "table_wise": lambda: plans.table_wise(rank=index % ranks, compute_kernel=kernel),
        "column_wise": lambda: plans.column_wise(ranks=list(range(ranks)), compute_kernel=kernel),
    }
    return plans.construct_module_sharding_plan(
        collection, {name: parts[placement]()}, sharder, _on_this_machine(ranks), ranks, device.torch_device.type
    )


def _planned(tables: nn.ModuleDict, sharder: Any, group: dist.ProcessGroup, device: Device) -> Any:
    """The plan of TorchRec's planner, whole tables or rows; the first rank's for all."""
    planner, types = library("torchrec.distributed.planner"), library("torchrec.distributed.planner.types")
    ranks, local = group.size(), _on_this_machine(group.size())
    memory = device.profile.memory_bytes
    on_host = None if memory is None else memory // local
    topology = types.TopologyFactory.create_topology(
        types.TrainerConfig(world_size=ranks, local_world_size=local),
        types.HardwareConfig(ddr_cap_bytes=on_host) if device.is_cpu else types.HardwareConfig(hbm_cap_bytes=memory),
        types.KernelConfig(compute_device=device.torch_device.type),
    )
    allowed = planner.ParameterConstraints(sharding_types=["row_wise", "table_wise"], compute_kernels=["fused"])
    reserved = library("torchrec.distributed.planner.storage_reservations").FixedPercentageStorageReservation(_RESERVED)
    chosen = planner.EmbeddingShardingPlanner(
        topology=topology, constraints=dict.fromkeys(tables, allowed), storage_reservation=reserved
    )
    try:
        return chosen.collective_plan(tables, [sharder], group)
    except types.PlannerError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"embedding.placement auto: TorchRec's planner finds no place: {reason}") from error
