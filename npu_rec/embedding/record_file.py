"""A sparse file of records of one size: record n at n times that size."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from npu_rec.errors import StorageError
from npu_rec.ops.compiled import extension

_Transfer = Callable[[int, list[memoryview], int], int]
_Failure = tuple[int, int]  # the number of a record, and the errno; 0: the file ends before it


class RecordFile:
    """The file, made anew, open and locked. What was never written reads as zeros and takes no disk.

    Raises:
        StorageError: here and in all calls: the system refuses, or another process has the file.
    """

    def __init__(self, path: Path, record_bytes: int, num_records: int) -> None:
        self.path, self.record_bytes, size = path, record_bytes, num_records * record_bytes
        try:
            # emptied only when it is known to be nobody else's
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+", 0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.truncate(size)
        except BlockingIOError:
            raise StorageError(f"{path}: another process has this file of rows open; give each its own") from None
        except OSError as error:
            raise self._refused(f"a file of {size} bytes cannot be opened", error.errno) from None

    def read(self, numbers: Tensor, records: Tensor) -> None:
        """Fill `records [U, width]`, contiguous, with those of `numbers [U]`, in their order on the disk."""
        read = _read_one_by_one if extension() is None else extension().records_read
        self._check("read", read(self._file.fileno(), numbers, numbers.argsort(), records))

    def write(self, numbers: Tensor, records: Tensor) -> None:
        """Write `records [U, width]`, contiguous, to the places of `numbers [U]`, which are distinct."""
        write = _write_one_by_one if extension() is None else extension().records_write
        self._check("written", write(self._file.fileno(), numbers, numbers.argsort(), records))

    def close(self) -> None:
        self._file.close()

    def _check(self, done: str, failure: _Failure | None) -> None:
        if failure is not None:
            number, error = failure
            raise self._refused(f"record {number} of {self.record_bytes} bytes cannot be {done}", error)

    def _refused(self, what: str, error: int | None) -> StorageError:
        return StorageError(f"{self.path}: {what}: {os.strerror(error) if error else 'the file ends before it'}")


def _read_one_by_one(file: int, numbers: Tensor, order: Tensor, records: Tensor) -> _Failure | None:
    """`records_read` of the compiled kernels in Python."""
    return _one_by_one(os.preadv, file, numbers, order, records)


def _write_one_by_one(file: int, numbers: Tensor, order: Tensor, records: Tensor) -> _Failure | None:
    """`records_write` alike."""
    return _one_by_one(os.pwritev, file, numbers, order, records)


def _one_by_one(transfer: _Transfer, file: int, numbers: Tensor, order: Tensor, records: Tensor) -> _Failure | None:
    rows = records.numpy().view(np.uint8)
    for i in order.tolist():
        row, number, done = memoryview(rows[i]), int(numbers[i]), 0
        while done < len(row):
            try:
                step = transfer(file, [row[done:]], number * len(row) + done)
            except OSError as error:
                return number, error.errno or 0
            if step == 0:
                return number, 0
            done += step
    return None
