"""Which rank writes which block of which tensor into which file: the same answer on all ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.tensor import DTensor

from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint.contents import Shard

FILE_BYTES = 2 << 30  # a file is put together in memory before it is written


@dataclass(frozen=True)
class Block:
    """A block of the tensor `name`: `sizes` at `offsets` of `shape`."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int
    is_whole: bool
    """Whether it is a Tensor, which all ranks have, and not a Shard."""

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.itemsize


def describe(tensors: Mapping[str, Tensor | Shard]) -> list[Block]:
    """The blocks this rank holds. A tensor without elements is one block, wherever a rank's part of it lies."""
    blocks = []
    for name, value in tensors.items():
        shard = Shard.of(value)
        offsets, sizes = shard.offsets, tuple(shard.local.shape)
        if not math.prod(shard.shape):
            offsets, sizes = (0,) * len(offsets), shard.shape
        itemsize = shard.local.element_size()
        is_whole = not isinstance(value, Shard | DTensor)
        blocks.append(Block(name, offsets, sizes, shard.shape, itemsize, is_whole))
    return blocks


def plan_files(blocks: Sequence[Sequence[Block]]) -> list[list[list[Block]]]:
    """The blocks of every file of every rank.

    A Tensor is the first rank's to write; a block that several ranks hold goes to the one with the least to write.
    Blocks larger than a file are cut along their first dimension.

    Args:
        blocks: of every rank, as `describe` gave them there.

    Raises:
        CheckpointError: the blocks of a tensor are not the whole.
    """
    holders: dict[Block, list[int]] = defaultdict(list)
    for rank, held in enumerate(blocks):
        for block in held:
            if (rank == 0 or not block.is_whole) and (block.bytes or not math.prod(block.shape)):
                holders[block].append(rank)
    _check_whole(blocks, holders)
    load = [0] * len(blocks)
    owned: list[list[Block]] = [[] for _ in blocks]
    for block, ranks in sorted(holders.items(), key=lambda item: -item[0].bytes):
        owner = min(ranks, key=lambda rank: load[rank])
        load[owner] += block.bytes
        owned[owner].append(block)
    return [_into_files([piece for block in mine for piece in _cut(block)]) for mine in owned]


def _check_whole(blocks: Sequence[Sequence[Block]], held: Mapping[Block, list[int]]) -> None:
    shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for block in (block for mine in blocks for block in mine):
        shapes[block.name].add(block.shape)
    elements: dict[str, int] = dict.fromkeys(shapes, 0)
    for block in held:
        elements[block.name] += math.prod(block.sizes)
    for name, (shape, *others) in ((name, sorted(found)) for name, found in shapes.items()):
        if others:
            raise CheckpointError(f"{name}: ranks differ in its shape: {list(shape)} and {list(others[0])}")
        if elements[name] != math.prod(shape):
            raise CheckpointError(
                f"{name}: the blocks of all ranks have {elements[name]} elements, {list(shape)} has "
                f"{math.prod(shape)}; they overlap, or some are missing"
            )


def _cut(block: Block) -> list[Block]:
    if block.bytes <= FILE_BYTES or not block.sizes:
        return [block]
    rows = max(1, block.sizes[0] * FILE_BYTES // block.bytes)
    pieces = []
    for start in range(0, block.sizes[0], rows):
        sizes = (min(rows, block.sizes[0] - start), *block.sizes[1:])
        pieces.append(replace(block, offsets=(block.offsets[0] + start, *block.offsets[1:]), sizes=sizes))
    return pieces


def _into_files(pieces: Sequence[Block]) -> list[list[Block]]:
    files: list[list[Block]] = []
    size, names = 0, set[str]()
    for piece in pieces:
        if not files or size + piece.bytes > FILE_BYTES or piece.name in names:  # a file has a name once
            files.append([])
            size, names = 0, set()
        files[-1].append(piece)
        size += piece.bytes
        names.add(piece.name)
    return files
