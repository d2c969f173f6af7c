"""Splits: which events train, validate and test. Leave-one-out here, by time in `labelled.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch

from npu_rec.data.batch import Batch, JaggedBatch
from npu_rec.data.store import SequenceStore
from npu_rec.errors import DataError
from npu_rec.ops.random import random_key, random_uniform

Protocol = Literal["holdout", "meta"]
Removed = Literal["history", "input", "none"]
Choice = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
"""Sequence ids `[B]`, events of their windows `[B]`, T in all, and times `[T]` or None -> which events stay, `[T]`."""

HELD_OUT: dict[Protocol, dict[str, int]] = {"holdout": {"valid": 2, "test": 1}, "meta": {"test": 1}}


@dataclass(frozen=True)
class Split(ABC):
    """Rows to train on or to evaluate, each a window of events `[starts, stops)` of a sequence."""

    store: SequenceStore
    sequences: np.ndarray  # [S] int64
    starts: np.ndarray  # [S] int64
    stops: np.ndarray  # [S] int64
    name: str

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    @abstractmethod
    def row_ids(self) -> np.ndarray:
        """Stable ids of the rows, `[S]` int64."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Events the model reads of each row, `[S]`."""

    @abstractmethod
    def subset(self, rows: np.ndarray) -> Self:
        """Some rows of the split."""

    @abstractmethod
    def batch(self, rows: np.ndarray, remove: Removed | None = None, choice: Choice | None = None) -> Batch:
        """The batch of some rows of the split.

        Args:
            rows: `[B]` int64 indices into the split.
            remove: in evaluation, which items the ranking leaves out (`eval.remove`).
            choice: in training, which events of the windows stay (`windows_batch`).
        """


@dataclass(frozen=True)
class LeaveOneOut(Split):
    """In training every event of a window but the first is predicted from those before it, in evaluation the last.

    Attributes:
        with_actions: batches have the actions of the events.
    """

    with_actions: bool = False

    @property
    def row_ids(self) -> np.ndarray:
        """Those of the sequences: each has one row."""
        return self.sequences

    def subset(self, rows: np.ndarray) -> LeaveOneOut:
        return replace(self, sequences=self.sequences[rows], starts=self.starts[rows], stops=self.stops[rows])

    @property
    def lengths(self) -> np.ndarray:
        """The events of the window but the last, `[S]`."""
        lengths: np.ndarray = self.stops - self.starts - 1
        return lengths

    def batch(self, rows: np.ndarray, remove: Removed | None = None, choice: Choice | None = None) -> JaggedBatch:
        sequences, starts, stops = self.sequences[rows], self.starts[rows], self.stops[rows]
        events = self.store.gather(sequences, starts, stops)
        actions = events.actions if self.with_actions else None
        batch = windows_batch(sequences, stops - starts, events.item_ids, events.times, choice, actions)
        if remove is not None:
            kept = {"history": np.zeros_like(starts), "input": starts, "none": stops - 1}[remove]
            removed = torch.from_numpy(self.store.gather(sequences, kept, stops - 1).item_ids.copy())
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(stops - 1 - kept)]))
            batch = replace(batch, removed=removed, removed_offsets=offsets)
        return batch


def windows_batch(
    sequences: np.ndarray,
    sizes: np.ndarray,
    item_ids: np.ndarray,
    times: np.ndarray | None,
    choice: Choice | None = None,
    actions: np.ndarray | None = None,
) -> JaggedBatch:
    """The batch of windows of events: each event but the last is read and predicts the one after it.

    Args:
        sequences: `[B]` int64 ids.
        sizes: `[B]` events of each window, two at least.
        item_ids, times, actions: `[T]` of the events.
        choice: which events stay, the last ones among them, or None for all. Each predicts the next that stays.
    """
    if choice is not None:
        mask = choice(sequences, sizes, times)
        sizes = np.diff(np.concatenate([[0], np.cumsum(mask)])[np.concatenate([[0], np.cumsum(sizes)])])
        item_ids = item_ids[mask]
        times, actions = (None if each is None else each[mask] for each in (times, actions))
    ends = np.cumsum(sizes)
    first = np.ones(len(item_ids), dtype=bool)
    first[ends - sizes] = False
    last = np.ones(len(item_ids), dtype=bool)
    last[ends - 1] = False
    columns = {"item_ids": item_ids[last], "next_ids": item_ids[first]}
    if times is not None:
        columns |= {"times": times[last], "next_times": times[first]}
    if actions is not None:
        columns |= {"actions": actions[last], "next_actions": actions[first]}
    offsets = np.concatenate([[0], np.cumsum(sizes - 1)])
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in columns.items()}
    return JaggedBatch(torch.from_numpy(sequences), torch.from_numpy(offsets), **tensors)


def leave_one_out(
    store: SequenceStore,
    protocol: Protocol,
    max_seq_len: int,
    *,
    with_actions: bool = False,
    target_actions: Sequence[int] | None = None,
) -> dict[str, Split]:
    """`train`, `test` and, for `holdout`, `valid`.

    Every window ends with an event to predict and has at most `max_seq_len` events before it, the
    most recent ones. Sequences too short to hold one event before the predicted one are left out.

    Args:
        with_actions: batches have the actions of the events.
        target_actions: the events held out are the last ones with one of these actions; None: the last ones.
    """
    held_out = HELD_OUT[protocol]
    places = {name: _places_from_behind(store, back, target_actions) for name, back in held_out.items()}
    train = store.lengths
    for place in reversed(places.values()):  # up to the first event held out
        train = np.where(place >= 0, place, train)
    stops = {"train": train} | {name: place + 1 for name, place in places.items()}
    splits: dict[str, Split] = {}
    for name, stop in stops.items():
        sequences = np.flatnonzero(stop >= 2).astype(np.int64)
        stop = stop[sequences]
        starts = np.maximum(stop - max_seq_len - 1, 0)
        splits[name] = LeaveOneOut(store, sequences, starts, stop, name, with_actions)
    return splits


def _places_from_behind(store: SequenceStore, back: int, actions: Sequence[int] | None) -> np.ndarray:
    """`[S]` int64: the place of each sequence's event number `back` from behind with one of the actions.

    Where there is none it is -1, or with actions None, when a sequence is too short, its length minus `back`.
    """
    if actions is None:
        return store.lengths - back
    first = np.cumsum(store.lengths) - store.lengths
    events = store.gather(np.arange(len(first)), np.zeros_like(first), store.lengths)
    assert events.actions is not None
    chosen = np.flatnonzero(np.isin(events.actions, actions))
    before, behind = (np.searchsorted(chosen, edge) for edge in (first, first + store.lengths))
    places = np.full(len(first), -1, np.int64)
    some = behind - before >= back
    places[some] = chosen[behind[some] - back] - first[some]
    return places


def share_of(split: Split, fraction: float, seed: int) -> Split:
    """The sequences whose hash with `seed` falls below `fraction`; a smaller fraction's are among a larger one's.

    Raises:
        DataError: when the split has sequences and none of them is kept.
    """
    if fraction >= 1.0 or not len(split):
        return split
    keys = random_key(seed, "fraction", torch.from_numpy(split.sequences))
    kept = np.flatnonzero((random_uniform(keys, 1)[:, 0] < fraction).numpy())
    if not len(kept):
        raise DataError(f"data.fraction: {fraction:g} of {len(split)} sequences leaves none for the {split.name} split")
    return split.subset(kept)


def train_item_counts(split: Split, num_items: int) -> np.ndarray:
    """How often each item occurs in the windows of a split, `[num_items + 1]` int64."""
    counts = np.zeros(num_items + 1, dtype=np.int64)
    for rows in np.array_split(np.arange(len(split)), max(1, len(split) // 65536)):
        events = split.store.gather(split.sequences[rows], split.starts[rows], split.stops[rows])
        counts += np.bincount(events.item_ids, minlength=num_items + 1)
    return counts
