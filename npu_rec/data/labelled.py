"""Splits by time for ranking: which actions are predicted, from which history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from npu_rec.data.batch import LabelledBatch
from npu_rec.data.splits import Choice, Removed, Split
from npu_rec.data.store import SequenceStore, ranges
from npu_rec.errors import ConfigError
from npu_rec.ops.random import random_key, random_uniform


@dataclass(frozen=True)
class LabelledSplit(Split):
    """Histories `[starts, stops)`, and behind each the candidates that share it.

    The actions of all candidates are predicted, and in a history those that are marked from `firsts` on.

    Attributes:
        firsts: `[S]` int64; `stops` where nothing of the history is predicted.
        candidates: `[C]` int64, places of events in their sequence, ascending in each row.
        candidate_offsets: `[S + 1]` int64.
        marked: `[E]` bool, for every event of the data set, whether its action may be predicted.
    """

    firsts: np.ndarray
    candidates: np.ndarray
    candidate_offsets: np.ndarray
    marked: np.ndarray

    @property
    def row_ids(self) -> np.ndarray:
        """The number, in the data set, of the event where the history stops."""
        ids: np.ndarray = first_events(self.store)[self.sequences] + self.stops
        return ids

    @property
    def num_targets(self) -> np.ndarray:
        """Candidates of each row, `[S]`."""
        return np.diff(self.candidate_offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Events of the history and candidates, `[S]`."""
        lengths: np.ndarray = self.stops - self.starts + self.num_targets
        return lengths

    def subset(self, rows: np.ndarray) -> LabelledSplit:
        kept = {name: getattr(self, name)[rows] for name in ("sequences", "starts", "stops", "firsts")}
        taken = ranges(self.candidate_offsets[rows], self.num_targets[rows])
        return replace(
            self, **kept, candidates=self.candidates[taken], candidate_offsets=_offsets(self.num_targets[rows])
        )

    def batch(self, rows: np.ndarray, remove: Removed | None = None, choice: Choice | None = None) -> LabelledBatch:
        """Nothing is ranked, so `remove` has no meaning here; `choice` must be None."""
        assert choice is None
        part = self.subset(rows)
        sizes, targets = part.stops - part.starts, part.num_targets
        owners = np.repeat(np.arange(len(rows)), sizes + targets)
        slot = np.arange(len(owners)) - np.repeat(_offsets(sizes + targets)[:-1], sizes + targets)
        behind = slot - sizes[owners]  # from 0 on: a candidate
        is_target = behind >= 0
        places = part.starts[owners] + slot
        places[is_target] = part.candidates[(part.candidate_offsets[owners] + behind)[is_target]]
        sequences = part.sequences[owners]
        events = self.store.gather(sequences, places, places + 1)
        if events.actions is None:
            raise ConfigError("task.name: ranking predicts actions, which the data set does not have")
        marked = self.marked[first_events(self.store)[sequences] + places]
        labelled = marked & (is_target | (places >= part.firsts[owners]))
        columns = {
            "sequence_ids": part.sequences,
            "offsets": _offsets(sizes + targets),
            "item_ids": events.item_ids,
            "row_ids": part.row_ids,
            "actions": events.actions,
            "labelled": labelled,
            "num_targets": targets,
        }
        if events.times is not None:
            columns["times"] = events.times
        return LabelledBatch(**{name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in columns.items()})


def split_by_time(
    store: SequenceStore,
    *,
    test_share: float,
    valid_share: float,
    unknown: int | None,
    max_seq_len: int,
    candidates: int,
    positive: Callable[[np.ndarray], np.ndarray] | None = None,
    negative_ratio: float = 1.0,
    seed: int = 0,
) -> dict[str, Split]:
    """`train`, `valid` and `test` of labelled events, cut at two times that hold for all users.

    In `valid` and `test` each labelled event is a row: a candidate behind the events before it, at most
    `max_seq_len`. In `train`, with `candidates` of 1 or more, so many labelled events in a row share the history before
    the first of them; with 0 the rows are windows of up to `max_seq_len` events, each of which half overlaps the one
    before, and in which every labelled event is predicted once.

    Args:
        test_share: of the labelled events, the latest, for the test; `valid_share`: of the others.
        unknown: the action of an event that has no label; None: all have.
        positive: actions `[E]` -> `[E]` bool; the others are negatives, of which training keeps `negative_ratio`.
        seed: of the choice.

    Raises:
        ConfigError: the data set has no actions or no times, or too few labels.
    """
    if not store.has_actions or not store.has_times:
        what = "actions" if not store.has_actions else "times"
        raise ConfigError(
            f"eval.protocol: time needs {what}, which the data set does not have"
            + ("; a recipe may read labels from another file (data.options.labels_file of ml-1m)" * (what == "actions"))
        )
    lengths = store.lengths
    events = store.gather(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    assert events.times is not None
    assert events.actions is not None
    if events.actions.min(initial=0) < 0:
        raise ConfigError(f"task.name: ranking needs actions of 0 or more, the data set has {events.actions.min()}")
    owners = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(owners)) - first_events(store)[owners]
    labelled = np.ones(len(owners), bool) if unknown is None else events.actions != unknown
    times = events.times
    latest = _latest(times[labelled], test_share)
    test = labelled & (times >= latest)
    latest = _latest(times[labelled & ~test], valid_share)
    valid = labelled & ~test & (times >= latest)
    train = labelled & ~test & ~valid
    if positive is not None and negative_ratio < 1.0:
        keys = random_key(seed, "negatives", torch.arange(len(owners)))
        kept = (random_uniform(keys, 1)[:, 0] < negative_ratio).numpy()
        train &= kept | positive(events.actions)
    splits: dict[str, Split] = {}
    for name, chosen in (("train", train), ("valid", valid), ("test", test)):
        if not chosen.any():
            raise ConfigError(f"eval.protocol: time leaves no labelled event for {name}")
        if name == "train" and candidates == 0:
            splits[name] = _windows(store, chosen, owners, places, max_seq_len)
        else:
            share = candidates if name == "train" else 1
            splits[name] = _histories(store, chosen, owners, places, max_seq_len, share, name)
    return splits


def first_events(store: SequenceStore) -> np.ndarray:
    """`[S]` int64: the number, in the data set, of each sequence's first event."""
    firsts: np.ndarray = np.cumsum(store.lengths) - store.lengths
    return firsts


def _latest(times: np.ndarray, share: float) -> int:
    """The time from which on about `share` of the events are; all of one second are on one side."""
    ordered = np.sort(times)
    if len(ordered) == 0:
        return 0
    return int(ordered[min(len(ordered) - 1, round(len(ordered) * (1 - share)))])


def _histories(
    store: SequenceStore,
    chosen: np.ndarray,
    owners: np.ndarray,
    places: np.ndarray,
    longest: int,
    share: int,
    name: str,
) -> LabelledSplit:
    """Rows of up to `share` chosen events of a sequence, behind the events before the first of them."""
    sequences, places = owners[chosen], places[chosen]
    number = np.arange(len(sequences)) - np.searchsorted(sequences, sequences)  # among the sequence's chosen ones
    begins = np.flatnonzero(number % share == 0)
    stops = places[begins]
    return LabelledSplit(
        store,
        sequences[begins],
        np.maximum(stops - longest, 0),
        stops,
        name,
        firsts=stops,
        candidates=places,
        candidate_offsets=np.append(begins, len(sequences)),
        marked=chosen,
    )


def _windows(
    store: SequenceStore, chosen: np.ndarray, owners: np.ndarray, places: np.ndarray, longest: int
) -> LabelledSplit:
    """Windows that end with the last chosen event of a sequence, or half a window before the next one."""
    step = max(1, longest // 2)
    sequences, last = owners[chosen], places[chosen]
    ends = np.flatnonzero(np.append(sequences[1:] != sequences[:-1], True))
    rows, stops = sequences[ends], last[ends] + 1
    count = 1 + -(-np.maximum(stops - longest, 0) // step)  # windows of each sequence
    back = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    rows, stops, count = (np.repeat(x, count) for x in (rows, stops, count))
    stops = stops - back * step
    starts = np.maximum(stops - longest, 0)
    firsts = np.where(back + 1 == count, starts, stops - step)
    split = LabelledSplit(
        store,
        rows,
        starts,
        stops,
        "train",
        firsts=firsts,
        candidates=np.zeros(0, np.int64),
        candidate_offsets=np.zeros(len(rows) + 1, np.int64),
        marked=chosen,
    )
    before = np.concatenate([[0], np.cumsum(chosen)])
    base = first_events(store)[rows]
    return split.subset(np.flatnonzero(before[base + stops] > before[base + firsts]))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
