"""Where rows of a table are kept that are not in the device's memory: records by number, on the host or on a disk.

A record is all there is of one row, its weights and the state of its optimiser: `width` float32 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from npu_rec.embedding.key_map import KeyMap
from npu_rec.embedding.record_file import RecordFile
from npu_rec.embedding.written_bits import WrittenBits

_FIRST_BLOCK = 1 << 10  # records


class RowStore(Protocol):
    """Records by number. Tensors are on the CPU, numbers int64, records float32.

    Attributes:
        width: float32 numbers of a record.
        bytes_read, bytes_written: of all records so far.
    """

    width: int
    bytes_read: int
    bytes_written: int

    def read(self, numbers: Tensor) -> Tensor:
        """Records `[U, width]` of `numbers [U]`. Raises ValueError when one was never written."""

    def write(self, numbers: Tensor, records: Tensor) -> None:
        """Keep `records [U, width]` under `numbers [U]`. Raises ValueError when numbers are not distinct."""

    def written(self, numbers: Tensor) -> Tensor:
        """Which of `numbers [U]` have a record, bool `[U]`."""

    def numbers_written(self) -> Tensor:
        """The numbers `[n]` that have a record, ascending."""

    def close(self) -> None:
        """Give back what the store holds, files as well; it is of no use afterwards."""

    @property
    def memory_bytes(self) -> int:
        """Memory of this process that the store holds between calls."""


class HostStore:
    """Records in the memory of the host, which grows with what was written; any int64 is a number.

    Records stand in blocks, each as large as all before it: few, and none is copied when the store grows. The unused
    end of the last one has no pages yet.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.bytes_read = self.bytes_written = 0
        self._map = KeyMap()
        self._blocks: list[Tensor] = []

    def read(self, numbers: Tensor) -> Tensor:
        slots = self._map.find(numbers)
        _check_written(numbers, slots >= 0)
        records = torch.empty(len(numbers), self.width, dtype=torch.float32)
        for which, block, places in self._in_blocks(slots):
            records.index_copy_(0, which, block.index_select(0, places))
        self.bytes_read += records.nbytes
        return records

    def write(self, numbers: Tensor, records: Tensor) -> None:
        _check_write(numbers, records, self.width)
        slots = self._map.find(numbers)
        new = slots < 0
        slots[new] = self._map.insert(numbers[new])
        while self._map.slot_limit > self._capacity:
            self._blocks.append(torch.empty(max(_FIRST_BLOCK, self._capacity), self.width, dtype=torch.float32))
        for which, block, places in self._in_blocks(slots):
            block.index_copy_(0, places, records.index_select(0, which))
        self.bytes_written += records.nbytes

    def written(self, numbers: Tensor) -> Tensor:
        return self._map.find(numbers) >= 0

    def numbers_written(self) -> Tensor:
        return self._map.items()[0].sort().values

    def close(self) -> None:
        self._map, self._blocks = KeyMap(), []

    @property
    def memory_bytes(self) -> int:
        return self._map.memory_bytes + self._map.slot_limit * self.width * 4

    @property
    def _capacity(self) -> int:
        return sum(len(block) for block in self._blocks)

    def _in_blocks(self, slots: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each block that `slots [U]` touch: which of them, the block, and their places in it."""
        first = 0
        for block in self._blocks:
            which = torch.nonzero((slots >= first) & (slots < first + len(block))).flatten()
            if len(which):
                yield which, block, slots[which] - first
            first += len(block)


class DiskStore:
    """Records in a sparse file: only those that were written take disk.

    They go through the system's calls and not through a memory map, so that the memory of this process is that of a
    call's tensors and one bit a record: which were written. The file is of use to this object alone.

    Args:
        path: the file, made anew.
        num_records: numbers are below it. They cost one bit each.

    Raises:
        StorageError: here and in all calls: the folder is missing, the disk is full, another process uses the file.
    """

    def __init__(self, path: Path, width: int, num_records: int) -> None:
        self.path, self.width = path, width
        self.bytes_read = self.bytes_written = 0
        self._bits = WrittenBits(num_records)
        self._file = RecordFile(path, width * 4, num_records)

    def read(self, numbers: Tensor) -> Tensor:
        _check_written(numbers, self.written(numbers))
        records = torch.empty(len(numbers), self.width, dtype=torch.float32)
        self._file.read(numbers.contiguous(), records)
        self.bytes_read += records.nbytes
        return records

    def write(self, numbers: Tensor, records: Tensor) -> None:
        _check_write(numbers, records, self.width)
        self.written(numbers)  # that they are within the file
        self._file.write(numbers.contiguous(), records.contiguous())
        self._bits.add(numbers)
        self.bytes_written += records.nbytes

    def written(self, numbers: Tensor) -> Tensor:
        return self._bits.contains(numbers)

    def numbers_written(self) -> Tensor:
        return self._bits.numbers()

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    @property
    def memory_bytes(self) -> int:
        return self._bits.memory_bytes


def _check_written(numbers: Tensor, written: Tensor) -> None:
    if not written.all():
        raise ValueError(f"record {int(numbers[~written][0])} was never written")


def _check_write(numbers: Tensor, records: Tensor, width: int) -> None:
    if records.shape != (len(numbers), width) or records.dtype != torch.float32:
        raise ValueError(
            f"records must be [{len(numbers)}, {width}] float32, got {list(records.shape)} {records.dtype}"
        )
    ascending = numbers.sort().values
    twice = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(twice):
        raise ValueError(f"record {int(twice[0])} is twice among those to write")
