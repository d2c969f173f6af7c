"""The tables of a model as `embedding:` describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from npu_rec.config import EmbeddingConfig
from npu_rec.distributed import World
from npu_rec.distributed.world import ALONE
from npu_rec.embedding.collection import EmbeddingCollection
from npu_rec.embedding.placement import BlockPlacement, HashPlacement, PlacementName
from npu_rec.embedding.slot_table import SlotTable
from npu_rec.embedding.slots import SlotPolicy
from npu_rec.embedding.table import EmbeddingTable, StaticTable, TableSpec
from npu_rec.embedding.torchrec_engine import torchrec_tables
from npu_rec.errors import ConfigError


def build_tables(
    specs: Sequence[TableSpec], config: EmbeddingConfig, backend: str = "auto", world: World = ALONE
) -> EmbeddingCollection:
    """This rank's part of the tables.

    Raises:
        ConfigError: the ranks cannot be divided into `embedding.replicas` groups.
    """
    if config.engine == "torchrec":
        assert config.placement != "replicated"  # config.py
        return EmbeddingCollection(torchrec_tables(specs, config.placement, world))
    if config.placement == "replicated" or world.size == 1:
        return EmbeddingCollection([_table(spec, config, backend, ALONE, i) for i, spec in enumerate(specs)])
    groups = config.replicas
    if world.size % groups:
        raise ConfigError(f"embedding.replicas: {world.size} ranks cannot be divided into {groups} equal groups")
    size = world.size // groups
    shared = world.split([range(group * size, (group + 1) * size) for group in range(groups)]) if groups > 1 else world
    replicas = world.split([range(rank, world.size, size) for rank in range(size)]) if groups > 1 else ALONE
    tables = [_table(spec, config, backend, shared, i) for i, spec in enumerate(specs)]
    return EmbeddingCollection(tables, shared.twin(), shared, replicas.twin(), replicas)


def _table(spec: TableSpec, config: EmbeddingConfig, backend: str, world: World, index: int) -> EmbeddingTable:
    below = None if config.tier == "device" else config.tier
    policy = SlotPolicy(
        config.rows, config.eviction, config.max_age, config.admission_count, config.admission_probability
    )
    if config.kind == "static":
        assert spec.num_rows is not None
        kind: PlacementName = "row_wise" if config.placement == "auto" else config.placement
        blocks = BlockPlacement(kind, spec.num_rows, spec.dim, world.size, owner=index % world.size)
        if config.tier == "device":
            return StaticTable(spec, blocks, world, backend)
        return SlotTable(spec, blocks, world.rank, backend, policy=policy, below=below)
    keyed = replace(spec, num_rows=None)
    return SlotTable(keyed, HashPlacement(spec.dim, world.size), world.rank, backend, policy=policy, below=below)
