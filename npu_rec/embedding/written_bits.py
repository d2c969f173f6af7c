"""Which records of a file were written: one bit each, in memory and, when saved, in a file of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_rec.errors import StorageError


class WrittenBits:
    """A set of the numbers below `count`, empty at first; numbers are int64 tensors `[U]` on the CPU."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._bytes = np.zeros(-(-count // 8), dtype=np.uint8)

    def add(self, numbers: Tensor) -> None:
        where, bit = self._places(numbers)
        np.bitwise_or.at(self._bytes, where, bit)

    def contains(self, numbers: Tensor) -> Tensor:
        """bool `[U]`. Raises ValueError when a number is not below `count`."""
        where, bit = self._places(numbers)
        return torch.from_numpy(self._bytes[where] & bit != 0)

    def numbers(self) -> Tensor:
        """All of them `[n]`, ascending."""
        some = np.flatnonzero(self._bytes)
        which, bit = np.nonzero(np.unpackbits(self._bytes[some], bitorder="little").reshape(-1, 8))
        return torch.from_numpy(some[which] * 8 + bit)

    @property
    def memory_bytes(self) -> int:
        return self._bytes.nbytes

    def save(self, path: Path, header: dict[str, int]) -> None:
        """Write the header, a line of JSON, and the bytes up to the last that is not 0; beside `path`, then renamed."""
        used = int(np.flatnonzero(self._bytes)[-1]) + 1 if self._bytes.any() else 0
        beside = path.with_name(path.name + ".new")
        try:
            with beside.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(self._bytes[:used].data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            raise StorageError(f"{beside}: cannot be written: {error.strerror}") from None

    def load(self, path: Path, header: dict[str, int]) -> None:
        """Read what `save` wrote. Raises StorageError when it was with another header, or cannot be read."""
        try:
            line, _, used = path.read_bytes().partition(b"\n")
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}; it tells which rows were written") from None
        expected = json.dumps(header)
        if line != expected.encode() or len(used) > len(self._bytes):
            raise StorageError(f"{path}: begins with {line[:80]!r} where {expected} is expected; make the store anew")
        self._bytes[: len(used)] = np.frombuffer(used, dtype=np.uint8)

    def _places(self, numbers: Tensor) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Of each number, its byte and the bit in it."""
        outside = numbers[(numbers < 0) | (numbers >= self.count)]
        if len(outside):
            raise ValueError(f"record {int(outside[0])} is outside of 0..{self.count - 1}")
        n = numbers.numpy()
        return n >> 3, (1 << (n & 7)).astype(np.uint8)
