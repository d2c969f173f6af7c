"""Which records of a file were written: one bit each, in memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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

    def _places(self, numbers: Tensor) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Of each number, its byte and the bit in it."""
        outside = numbers[(numbers < 0) | (numbers >= self.count)]
        if len(outside):
            raise ValueError(f"record {int(outside[0])} is outside of 0..{self.count - 1}")
        n = numbers.numpy()
        return n >> 3, (1 << (n & 7)).astype(np.uint8)
