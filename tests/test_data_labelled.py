"""Splits by time for ranking, against loops over the users."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from npu_rec.data import Events
from npu_rec.data.labelled import LabelledSplit, split_by_time
from npu_rec.data.loader import TrainLoader
from npu_rec.errors import ConfigError

LONGEST = 6


class ActionStore:
    """What splits use of a SequenceStore, over random users."""

    def __init__(self, lengths: list[int], seed: int = 0, *, known: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = np.array(lengths, np.int64)
        self.has_times = self.has_actions = True
        total = int(self.lengths.sum())
        self.items = rng.integers(1, 30, total)
        self.times = np.concatenate([np.sort(rng.integers(0, 500, n)) for n in lengths]).astype(np.int64)
        self.actions = np.where(rng.random(total) < known, rng.integers(1, 6, total), 0)

    def gather(self, sequences: Any, starts: Any, stops: Any) -> Events:
        first = (np.cumsum(self.lengths) - self.lengths)[np.asarray(sequences)]
        places = [np.arange(f + a, f + b) for f, a, b in zip(first, starts, stops, strict=True)]
        chosen = np.concatenate(places) if places else np.zeros(0, np.int64)
        return Events(self.items[chosen], self.times[chosen], self.actions[chosen])


def splits_of(store: ActionStore, **changes: Any) -> dict[str, LabelledSplit]:
    settings = {"test_share": 0.2, "valid_share": 0.2, "unknown": 0, "max_seq_len": LONGEST, "candidates": 3} | changes
    return split_by_time(store, **settings)  # type: ignore[return-value, arg-type]


def predicted(split: LabelledSplit) -> list[tuple[int, int, int, list[int], list[int]]]:
    """(user, item, action, items of what is before it in its row, times) of every labelled event, by the batch."""
    batch = split.batch(np.arange(len(split)))
    found = []
    for row, user in enumerate(batch.sequence_ids.tolist()):
        own = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        items, actions, times = (x[own].tolist() for x in (batch.item_ids, batch.actions, batch.times))
        history = len(items) - int(batch.num_targets[row])
        for place in batch.labelled[own].nonzero().squeeze(1).tolist():
            found.append((user, items[place], actions[place], items[: min(place, history)], times))
    return found


@examples(40)
@given(st.lists(st.integers(1, 25), min_size=3, max_size=8), st.integers(0, 3), st.integers(0, 10**6))
def test_every_label_is_predicted_once(lengths: list[int], candidates: int, seed: int) -> None:
    store = ActionStore(lengths, seed, known=0.7)
    try:
        splits = splits_of(store, candidates=candidates)
    except ConfigError:
        return  # too few labels
    owners = np.repeat(np.arange(len(lengths)), lengths)
    known = store.actions > 0
    cuts = [np.sort(store.times[known])]
    cuts.append(cuts[0][min(len(cuts[0]) - 1, round(len(cuts[0]) * 0.8))])
    rest = np.sort(store.times[known & (store.times < cuts[1])])
    middle = rest[min(len(rest) - 1, round(len(rest) * 0.8))]
    spans = {"train": (-1, middle), "valid": (middle, cuts[1]), "test": (cuts[1], 10**9)}
    for name, (low, high) in spans.items():
        chosen = known & (store.times >= low) & (store.times < high)
        wanted = sorted(zip(owners[chosen], store.items[chosen], store.actions[chosen], strict=True))
        assert sorted(found[:3] for found in predicted(splits[name])) == wanted


@pytest.mark.parametrize("name", ["valid", "test"])
def test_a_candidate_is_behind_all_events_before_it(name: str) -> None:
    store = ActionStore([20, 3, 17, 9])
    split = splits_of(store)[name]
    assert split.num_targets.tolist() == [1] * len(split)
    firsts = np.cumsum(store.lengths) - store.lengths
    for row in range(len(split)):
        user, place = split.sequences[row], split.stops[row]
        batch = split.batch(np.array([row]))
        before = store.items[firsts[user] : firsts[user] + place].tolist()[-LONGEST:]
        assert batch.item_ids.tolist() == [*before, store.items[firsts[user] + place]]
        assert batch.labelled.tolist() == [False] * len(before) + [True]
        assert batch.times is not None
        assert batch.times[-1] == store.times[firsts[user] + place]


def test_training_knows_nothing_later() -> None:
    """No event behind the last trained label is in a row of training."""
    store = ActionStore([40, 30, 50], known=0.4)
    for candidates in (0, 1, 4):
        splits = splits_of(store, candidates=candidates)
        limit = min(found[4][-1] for name in ("valid", "test") for found in predicted(splits[name]))
        batch = splits["train"].batch(np.arange(len(splits["train"])))
        assert batch.times is not None
        assert int(batch.times.max()) < limit


def test_windows_give_a_label_at_least_half_a_history() -> None:
    store = ActionStore([100, 4], known=1.0)
    split = splits_of(store, candidates=0)["train"]
    assert (split.lengths <= LONGEST).all()
    for user, _, _, before, _ in predicted(split):
        assert user == 1 or len(before) >= LONGEST // 2 or before == store.items[: len(before)].tolist()


def test_candidates_share_the_history_of_the_first() -> None:
    store = ActionStore([12], known=1.0)
    split = splits_of(store, candidates=4, test_share=0.1, valid_share=0.1)["train"]
    batch = split.batch(np.arange(2))
    assert batch.num_targets.tolist() == [4, 4]
    first, second = batch.item_ids.split(batch.offsets.diff().tolist())
    assert first.tolist() == store.items[:4].tolist()  # candidates without a history
    assert second.tolist() == store.items[:8].tolist()


def test_some_of_the_negatives_train() -> None:
    store = ActionStore([400, 300], known=1.0)
    positive = np.array([False, False, False, True, True, True])
    every = predicted(splits_of(store, positive=positive.__getitem__)["train"])
    some = predicted(splits_of(store, positive=positive.__getitem__, negative_ratio=0.25)["train"])
    counts = [sum(action < 3 for _, _, action, _, _ in found) for found in (every, some)]
    assert sum(action >= 3 for _, _, action, _, _ in some) == sum(action >= 3 for _, _, action, _, _ in every)
    assert counts[1] == pytest.approx(0.25 * counts[0], rel=0.3)


def test_rows_have_ids_of_their_own_and_can_be_chosen() -> None:
    split = splits_of(ActionStore([30, 40, 20]))["train"]
    assert len(set(split.row_ids.tolist())) == len(split)
    chosen = np.array([3, 0, 5])
    part, whole = split.subset(chosen).batch(np.arange(3)), split.batch(chosen)
    assert torch.equal(part.item_ids, whole.item_ids)
    assert torch.equal(part.row_ids, whole.row_ids)
    loader = TrainLoader(split, batch_size=4, batch_tokens=None, seed=1)
    assert sorted(np.concatenate(loader.batches(0)).tolist()) == list(range(len(split)))


def test_what_is_missing_is_said() -> None:
    store = ActionStore([5, 5])
    with pytest.raises(ConfigError, match="no labelled event for"):
        splits_of(store, test_share=0.001, valid_share=0.999)
    store.has_actions = False
    with pytest.raises(ConfigError, match="needs actions"):
        splits_of(store)
    store = ActionStore([5, 5])
    store.actions[0] = -3
    with pytest.raises(ConfigError, match="0 or more"):
        splits_of(store)
