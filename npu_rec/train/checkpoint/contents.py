"""What a rank has to save: tensors, blocks of tensors, rows by key, and documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from npu_rec.config import Config, dump_config
from npu_rec.tasks import DataFacts
from npu_rec.train.checkpoint.disk import FORMAT

KEYS = "keys"


@dataclass(frozen=True)
class Shard:
    """A block of a bigger tensor: what this rank holds of it.

    Attributes:
        local: the block's values; any dimension may be 0.
        offsets: where the block begins in the whole tensor, a number a dimension.
        shape: of the whole tensor.
    """

    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = self.local.shape
        if not len(sizes) == len(self.offsets) == len(self.shape) or any(
            offset < 0 or offset + size > whole
            for size, offset, whole in zip(sizes, self.offsets, self.shape, strict=True)
        ):
            raise ValueError(f"a block {list(sizes)} at {list(self.offsets)} does not lie in {list(self.shape)}")

    @classmethod
    def of(cls, value: Tensor | Shard) -> Shard:
        """What this rank holds of a DTensor (FSDP2's parameters); another tensor is a block that is the whole."""
        if isinstance(value, Shard):
            return value
        if isinstance(value, DTensor):
            (chunk,) = value.__create_chunk_list__()  # what DTensor tells torch.distributed.checkpoint
            return cls(value.to_local(), tuple(chunk.offsets), tuple(value.shape))
        return cls(value, (0,) * value.dim(), tuple(value.shape))


@dataclass(frozen=True)
class Keyed:
    """Rows known by a 64-bit key: of a dynamic table, or those of a static one that a delta carries.

    Attributes:
        keys: `[n]` int64, distinct over all ranks.
        columns: name -> `[n, ...]`: weights, optimiser state, counters, last step.
    """

    keys: Tensor
    columns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.keys.dim() != 1 or self.keys.dtype != torch.int64:
            raise ValueError(f"keys must be [n] int64, got {list(self.keys.shape)} {self.keys.dtype}")
        wrong = [name for name, rows in self.columns.items() if not rows.dim() or rows.shape[0] != len(self.keys)]
        if wrong or KEYS in self.columns:
            raise ValueError(f"columns must have a row a key and another name than {KEYS!r}: {wrong or KEYS}")

    def copy(self) -> Keyed:
        """The same rows in host memory of their own."""
        columns = {name: rows.detach().to("cpu", copy=True) for name, rows in self.columns.items()}
        return Keyed(self.keys.to("cpu", copy=True), columns)


@dataclass(frozen=True)
class Snapshot:
    """Everything a rank has to save. Names are the same on all ranks, but for Shards that a rank has nothing of.

    Attributes:
        tensors: by name. A Tensor is equal on all ranks and the first rank's is written; of Shards and DTensors each
            block is written once, whichever ranks hold it, and together they must be the whole.
        keyed: by name, this rank's rows. Rows that do not fit into memory come as an Iterable of pieces, which is
            gone through before the call that takes the Snapshot returns.
        documents: file name -> text, and
        copies: file name -> file to copy; the first rank's are written.
    """

    tensors: Mapping[str, Tensor | Shard] = field(default_factory=dict)
    keyed: Mapping[str, Keyed | Iterable[Keyed]] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)


def checkpoint_snapshot(
    *,
    tensors: Mapping[str, Tensor | Shard],
    keyed: Mapping[str, Keyed | Iterable[Keyed]] | None = None,
    config: Config,
    facts: DataFacts,
    items: Path,
    state: Mapping[str, Any],
) -> Snapshot:
    """A checkpoint of training: with it a run resumes, and `evaluate` and `recommend` work.

    Args:
        tensors: `model.*`, `optimizer.*`, `random.*`.
        items: the item table of the prepared data.
        state: what fits into JSON: step, position in the data, counters.
    """
    full = {"format": FORMAT, "num_items": facts.num_items, "has_times": facts.has_times, **state}
    known = {"facts.catalogue": facts.catalogue, "facts.item_counts": facts.item_counts}
    return Snapshot(
        tensors={**tensors, **{name: value for name, value in known.items() if isinstance(value, Tensor)}},
        keyed=keyed or {},
        documents={"state.json": json.dumps(full, indent=1), "config.yaml": dump_config(config)},
        copies={"items.arrow": items},
    )
