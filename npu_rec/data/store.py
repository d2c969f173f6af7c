"""Prepared sequences, memory-mapped: numpy views on the Arrow shards, nothing copied until it is gathered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npu_rec.data.manifest import read_manifest, verify
from npu_rec.errors import DataError

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Events:
    """Events of several sequences, one after the other."""

    item_ids: Int64Array  # [T]
    times: Int64Array | None  # [T] seconds since 1970; None for data without times
    actions: Int64Array | None  # [T]; None for data without actions


class SequenceStore:
    """A folder that `prepare` made. Safe to pickle: a worker process maps the files itself.

    Args:
        path: the folder.
        check: also verify every byte against the manifest's SHA-256; sizes are always verified.

    Attributes:
        num_sequences: S, one a user; a sequence's index is its stable id.
        num_events: events of all sequences.
        num_items: the largest item id, so that tables have num_items + 1 rows; 0 is padding.
        has_times, has_actions: whether `gather` gives them.
        lengths: [S] int64.
        manifest: counts, options, source and terms.

    Raises:
        DataError: when the folder is no intact prepared data set.
    """

    def __init__(self, path: str | Path, *, check: bool = False) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = verify(self.path) if check else read_manifest(self.path)
        self.num_items: int = self.manifest["num_items"]
        self.has_times: bool = self.manifest["has_times"]
        self.has_actions: bool = self.manifest["has_actions"]
        self._shards = [_Shard(self.path / name) for name in self.manifest["shards"]]
        self._first = np.cumsum([0, *(len(shard.starts) - 1 for shard in self._shards)])  # sequences before a shard
        self.lengths: Int64Array = np.concatenate([np.diff(shard.starts) for shard in self._shards])
        self.num_sequences = len(self.lengths)
        self.num_events = int(self.lengths.sum())

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceStore, (self.path,)

    def __len__(self) -> int:
        return self.num_sequences

    def gather(self, sequences: npt.ArrayLike, starts: npt.ArrayLike, stops: npt.ArrayLike) -> Events:
        """Events start:stop of each sequence, concatenated.

        Args:
            sequences: [B] indices, in any order, repeats allowed.
            starts, stops: [B], 0 <= start <= stop <= length.

        Returns:
            T = sum(stops - starts) events.

        Raises:
            IndexError: when an index, a start or a stop is out of range.
        """
        rows, first, last = (np.atleast_1d(np.asarray(x, dtype=np.int64)) for x in (sequences, starts, stops))
        if not ((rows >= 0) & (rows < self.num_sequences)).all():
            raise IndexError(f"sequence index out of range 0..{self.num_sequences - 1}")
        if not ((first >= 0) & (first <= last) & (last <= self.lengths[rows])).all():
            raise IndexError("a start or stop lies outside its sequence, or start > stop")
        lengths = last - first
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        total = int(offsets[-1])
        times = _empty(total) if self.has_times else None
        actions = _empty(total) if self.has_actions else None
        events = Events(_empty(total), times, actions)
        for home, chosen in self._split(rows):
            shard = self._shards[home]
            source = shard.starts[rows[chosen] - self._first[home]] + first[chosen]
            picked = ranges(source, lengths[chosen])
            into = slice(None) if len(chosen) == len(rows) else ranges(offsets[:-1][chosen], lengths[chosen])
            for name in ("item_ids", "times", "actions"):
                values = getattr(events, name)
                if values is not None:
                    values[into] = getattr(shard, name)[picked]
        return events

    def users(self, sequences: npt.ArrayLike) -> list[Any]:
        """Raw user ids [B] of sequences: text, or int where the data set's ids are numbers."""
        users = pa.chunked_array([shard.users for shard in self._shards])
        return list(users.take(pa.array(np.atleast_1d(np.asarray(sequences, dtype=np.int64)))).to_pylist())

    @cached_property
    def items(self) -> pa.Table:
        """The item map, one row a listed item, ascending: item_id int64, raw_id string, title string or null,
        events int64 (how often it occurs), and the data set's features."""
        return _table(self.path / "items.arrow")

    @cached_property
    def user_features(self) -> pa.Table | None:
        """`user` (raw id) and features, row i for sequence i, or None; null where the publisher lists no such user."""
        return _table(self.path / "users.arrow") if "users.arrow" in self.manifest["files"] else None

    @cached_property
    def num_actions(self) -> int:
        """The largest action and one; 0 for data without actions."""
        actions = [shard.actions for shard in self._shards if shard.actions is not None]
        return 1 + max((int(each.max()) for each in actions if len(each)), default=-1)

    @cached_property
    def least_action(self) -> int:
        """The smallest action; 0 for data without actions."""
        actions = [shard.actions for shard in self._shards if shard.actions is not None]
        return min((int(each.min()) for each in actions if len(each)), default=0)

    def catalogue(self, which: Literal["all", "seen"]) -> Int64Array:
        """Item ids that negatives and ranking use, ascending, without 0: all listed, or those with events."""
        ids: Int64Array = self.items["item_id"].to_numpy()
        return ids if which == "all" else ids[self.items["events"].to_numpy() > 0]

    def item_counts(self) -> Int64Array:
        """[num_items + 1] int64: how often each id occurs in the whole data."""
        counts = np.zeros(self.num_items + 1, np.int64)
        counts[self.items["item_id"].to_numpy()] = self.items["events"].to_numpy()
        return counts

    def _split(self, rows: Int64Array) -> Iterator[tuple[int, Int64Array]]:
        """Numbers of the shards in play, each with the places of its rows."""
        homes = np.searchsorted(self._first, rows, side="right") - 1
        for home in np.unique(homes).tolist():
            yield home, np.flatnonzero(homes == home)


class _Shard:
    """Views on one mapped file."""

    def __init__(self, path: Path) -> None:
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable shard ({error}); prepare the data again") from None
        self.users: pa.Array = batch.column("user")
        self.starts: Int64Array = batch.column("item_ids").offsets.to_numpy()  # [sequences + 1]
        self.item_ids: Int64Array = batch.column("item_ids").values.to_numpy(zero_copy_only=True)
        self.times = _values(batch, "times")
        self.actions = _values(batch, "actions")


def _values(batch: pa.RecordBatch, name: str) -> Int64Array | None:
    return batch.column(name).values.to_numpy(zero_copy_only=True) if name in batch.schema.names else None


def _empty(total: int) -> Int64Array:
    return np.empty(total, np.int64)


def _table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def ranges(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """The numbers start .. start + length - 1 of each pair, concatenated."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)
