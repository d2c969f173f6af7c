"""Writes jagged sequences as Arrow IPC files of one record batch each, so that a reader maps them without copying."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

SHARD_EVENTS = 2**24
"""Events of a shard, unless one sequence alone has more: 128 MiB a column."""


@dataclass
class Sequences:
    """Sequences of S users with T events altogether, packed."""

    users: pa.Array  # [S] string or int64
    lengths: np.ndarray  # [S] int64
    item_ids: np.ndarray  # [T] int64
    times: np.ndarray | None  # [T] int64 seconds
    actions: np.ndarray | None  # [T] int64

    def rows(self, start: int, stop: int, ends: np.ndarray) -> Sequences:
        """Sequences start:stop, where `ends` is the running sum of lengths."""
        first, last = (int(ends[start - 1]) if start else 0), (int(ends[stop - 1]) if stop else 0)

        def cut(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[first:last]

        return Sequences(
            self.users.slice(start, stop - start),
            self.lengths[start:stop],
            self.item_ids[first:last],
            cut(self.times),
            cut(self.actions),
        )


class ShardWriter:
    """Collects sequences into `sequences-00000.arrow`, `sequences-00001.arrow`, ...

    Args:
        folder: where the files go.
        shard_events: events after which a shard is closed.
    """

    def __init__(self, folder: Path, shard_events: int = SHARD_EVENTS) -> None:
        self.files: list[str] = []
        self._folder = folder
        self._limit = shard_events
        self._waiting: list[Sequences] = []
        self._waiting_events = 0

    def add(self, block: Sequences) -> None:
        """Append sequences."""
        ends = np.cumsum(block.lengths)
        start, total = 0, len(block.lengths)
        while start < total:
            done = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, done + self._limit - self._waiting_events, side="right"))
            if stop <= start and not self._waiting:
                stop = start + 1  # one sequence longer than a shard
            if stop > start:
                self._waiting.append(block.rows(start, stop, ends))
                self._waiting_events += int(ends[stop - 1]) - done
                start = stop
            if start < total:
                self.close()

    def close(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        parts, self._waiting, self._waiting_events = self._waiting, [], 0
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))])
        columns: dict[str, pa.Array] = {"user": pa.concat_arrays([part.users for part in parts])}
        for name in ("item_ids", "times", "actions"):
            values = [getattr(part, name) for part in parts]
            if values[0] is not None:
                columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))
        self.files.append(f"sequences-{len(self.files):05d}.arrow")
        batch = pa.record_batch(columns)
        with pa.OSFile(str(self._folder / self.files[-1]), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as file:
            file.write_batch(batch)
