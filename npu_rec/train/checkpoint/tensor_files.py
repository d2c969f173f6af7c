"""Blocks of tensors in safetensors files, by the storage classes of torch.distributed.checkpoint.

The classes are driven without its `save` and `load`: those keep all ranks inside collectives while they write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint.contents import Shard
from npu_rec.train.checkpoint.plan import Block

INDEX = "model.safetensors.index.json"
UNREADABLE = (SafetensorError, CheckpointException, OSError, ValueError, KeyError)


def file_name(number: int, total: int) -> str:
    """Of the file `number` of `total`, from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


class _Given(DefaultSavePlanner):
    """Gives the writer the tensors by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.tensors[write_item.index.fqn]


def write_blocks(folder: Path, blocks: Sequence[Block], tensors: Mapping[str, Shard], number: int, total: int) -> str:
    """Write the file `number` of `total`; its name.

    Args:
        blocks: at most one of a name.
        tensors: what this rank holds, in host memory, by name.
    """
    values, items = {}, []
    for block in blocks:
        values[block.name] = _cut_out(tensors[block.name], block)
        chunk = ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))
        properties = TensorProperties(dtype=values[block.name].dtype)
        data = TensorWriteData(chunk, properties, torch.Size(block.shape))
        items.append(WriteItem(MetadataIndex(block.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
    numbers = dict.fromkeys(values, number) | {"": total}  # the largest number is the "of" in the file's name
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers)
    (plan,) = writer.prepare_global_plan([SavePlan(items)])
    writer.write_data(plan, _Given(values)).wait()
    return file_name(number, total)


def _cut_out(shard: Shard, block: Block) -> Tensor:
    if not math.prod(block.sizes):
        return shard.local.new_empty(block.sizes)
    if not block.sizes:
        return shard.local.contiguous()
    return shard.local.narrow(0, block.offsets[0] - shard.offsets[0], block.sizes[0]).contiguous()


def write_index(folder: Path, files: Mapping[str, Sequence[Block]]) -> str:
    """Which tensor lies in which file, as Hugging Face writes it; in which files, where there are several."""
    places: dict[str, list[str]] = {}
    for file, blocks in files.items():
        for block in blocks:
            places.setdefault(block.name, []).append(file)
    size = sum(block.bytes for blocks in files.values() for block in blocks)
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: found[0] if len(found) == 1 else found for name, found in sorted(places.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return INDEX


class _Into(DefaultLoadPlanner):
    """Has the reader fill tensors that are named."""

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.targets[index.fqn]


class TensorFiles:
    """The tensors of a folder, whatever the blocks they were written in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        try:
            metadata = self._reader.read_metadata()
        except UNREADABLE as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from None
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def entry(self, name: str) -> TensorStorageMetadata:
        """Shape, dtype and blocks of a tensor."""
        if name not in self.entries:
            raise CheckpointError(f"{self.folder}: holds no tensor {name}")
        return self.entries[name]

    def fill(self, targets: Mapping[str, Shard]) -> None:
        """Read blocks into the tensors `targets` hold, on whatever device; of each file only the bytes needed.

        Raises:
            CheckpointError: a name or shape is not that of the stored tensor, or a file cannot be read.
        """
        items = []
        for name, shard in targets.items():
            stored = self.entry(name)
            if tuple(stored.size) != shard.shape:
                raise CheckpointError(f"{self.folder}: {name} is {list(stored.size)}, {list(shard.shape)} is wanted")
            chunk = ChunkStorageMetadata(torch.Size(shard.offsets), shard.local.shape)
            found = create_read_items_for_chunk_list(name, stored, [chunk])
            if sum(math.prod(item.lengths) for item in found) != shard.local.numel():
                raise CheckpointError(f"{self.folder}: {name} is not whole; use another checkpoint")
            items += found
        locals_ = {name: shard.local.detach() for name, shard in targets.items()}
        try:
            self._reader.read_data(LoadPlan(items), _Into(locals_)).wait()
        except UNREADABLE as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error}") from None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, in host memory."""
        whole = {name: torch.empty(self.entry(name).size, dtype=self.entry(name).properties.dtype) for name in names}
        self.fill({name: Shard.of(value) for name, value in whole.items()})
        return whole
