"""Reading what was saved: whole tensors, any block of them, rows by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from npu_rec.distributed.world import ALONE, World
from npu_rec.errors import CheckpointError
from npu_rec.tasks import DataFacts
from npu_rec.train.checkpoint import disk, keyed_files
from npu_rec.train.checkpoint.agreement import together
from npu_rec.train.checkpoint.contents import Keyed, Shard
from npu_rec.train.checkpoint.tensor_files import TensorFiles


@dataclass(frozen=True)
class Stored:
    """A verified folder on disk, written by any number of ranks."""

    path: Path
    state: dict[str, Any]

    @cached_property
    def _tensors(self) -> TensorFiles:
        return TensorFiles(self.path)

    @cached_property
    def _keyed(self) -> dict[str, list[keyed_files.KeyedFile]]:
        return keyed_files.read_index(self.path)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted(self._tensors.entries)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._tensors.entry(name).size)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix.`, without it, whole, in host memory."""
        wanted = self._tensors.read(name for name in self._tensors.entries if name.startswith(f"{prefix}."))
        return {name.removeprefix(f"{prefix}."): value for name, value in wanted.items()}

    def read(self, name: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The block `shape` at `offsets` of a tensor, in host memory; of the files only the bytes needed."""
        entry = self._tensors.entry(name)
        local = torch.empty(tuple(shape), dtype=entry.properties.dtype)
        try:
            shard = Shard(local, tuple(offsets), tuple(entry.size))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from None
        self.fill({name: shard})
        return local

    def fill(self, targets: Mapping[str, Tensor | Shard]) -> None:
        """Read many at once into memory that exists: tensors, what this rank holds of DTensors, blocks.

        Raises:
            CheckpointError: no such tensor, or its shape is another; it is named.
        """
        self._tensors.fill({name: Shard.of(target) for name, target in targets.items()})

    @property
    def keyed_names(self) -> list[str]:
        """Of all tables with rows by key."""
        return sorted(self._keyed)

    def keyed_rows(self, name: str) -> int:
        """How many rows a table has, of all ranks."""
        return sum(file.rows for file in self._keyed_files(name))

    def keyed(self, name: str) -> Iterator[Keyed]:
        """The rows of a table, of all ranks, in pieces of at most `keyed_files.PIECE_BYTES` bytes."""
        return keyed_files.read_pieces(self.path, self._keyed_files(name))

    def _keyed_files(self, name: str) -> list[keyed_files.KeyedFile]:
        if name not in self._keyed:
            raise CheckpointError(f"{self.path}: holds no rows by key of {name}")
        return self._keyed[name]


class Checkpoint(Stored):
    """A checkpoint of training."""

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def items_path(self) -> Path:
        return self.path / "items.arrow"

    def check_items(self, items: Path) -> None:
        """Raise CheckpointError unless the items of a prepared data set have the ids they had in training."""
        ours, theirs = (read_items(path).select(["raw_id", "item_id"]) for path in (self.items_path, items))
        if ours.equals(theirs):
            return
        trained, given = (
            dict(zip(*(table.column(c).to_pylist() for c in ("raw_id", "item_id")), strict=True))
            for table in (ours, theirs)
        )
        if trained == given:
            return
        raw = next((x for x in trained if trained[x] != given.get(x)), None) or next(
            x for x in given if x not in trained
        )
        here, there = trained.get(raw, "unknown"), given.get(raw, "unknown")
        raise CheckpointError(
            f"{self.path}: was trained with other item ids: item {raw!r} is {here} there and {there} in this data set; "
            "use the data it was trained on"
        )

    def facts(self) -> DataFacts:
        """What the model knows of its data set."""
        tensors, num_items = self.tensors("facts"), self.state["num_items"]
        catalogue = tensors.get("catalogue", range(1, num_items + 1))
        return DataFacts(num_items, catalogue, tensors.get("item_counts"), bool(self.state["has_times"]))


def read_items(path: Path) -> pa.Table:
    """The item table of a prepared data set or a checkpoint."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def open_checkpoint(path: Path, world: World = ALONE) -> Checkpoint:
    """Verify every file of a checkpoint against its manifest; the ranks of `world` share the work.

    Raises:
        CheckpointError: not a checkpoint, or a file is missing, truncated or altered; the file is named, on all ranks.
    """
    state = verify(path, world)
    if "config.yaml" not in disk.read_manifest(path):
        raise CheckpointError(f"{path}: a delta of rows, not a checkpoint; apply it to one")
    return Checkpoint(path, state)


def verify(path: Path, world: World) -> dict[str, Any]:
    """Verify a folder; its state.json."""

    def check() -> None:
        files = sorted(disk.read_manifest(path).items())
        for name, (digest, size) in files[world.rank :: world.size]:
            disk.check_file(path / name, digest, size)

    together(world, f"checkpoint {path.name}: verified", check)
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state
