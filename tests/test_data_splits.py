"""Leave-one-out splits and the order of training, against a loop over the users."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from npu_rec.config import DataConfig
from npu_rec.data import Events, SequenceStore, prepare
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.loader import TrainLoader
from npu_rec.data.splits import LeaveOneOut, Protocol, Split, leave_one_out, share_of, train_item_counts
from npu_rec.errors import DataError

Event = tuple[int, int | None]  # item, time
Users = list[list[Event]]
REMOVALS = ("history", "input", "none")


class ListStore:
    """What splits use of a SequenceStore, over lists."""

    def __init__(self, users: Users, has_times: bool = True) -> None:
        self.users, self.has_times = users, has_times
        self.lengths = np.array([len(user) for user in users], np.int64)

    def gather(self, sequences: Any, starts: Any, stops: Any) -> Events:
        events = [e for s, a, b in zip(sequences, starts, stops, strict=True) for e in self.users[s][a:b]]
        items = np.array([item for item, _ in events], np.int64)
        return Events(items, np.array([time for _, time in events], np.int64) if self.has_times else None, None)


def random_users(lengths: list[int], seed: int = 0) -> Users:
    rng = np.random.default_rng(seed)
    return [
        list(zip(rng.integers(1, 30, n).tolist(), np.sort(rng.integers(0, 1000, n)).tolist(), strict=True))
        for n in lengths
    ]


def random_split(lengths: list[int], max_seq_len: int = 5, name: str = "train") -> Split:
    return leave_one_out(ListStore(random_users(lengths)), "meta", max_seq_len)[name]  # type: ignore[arg-type]


def windows(
    users: Users, protocol: Protocol, name: str, max_seq_len: int
) -> dict[int, tuple[list[Event], list[Event]]]:
    """Sequence id -> (all its events up to the predicted one, those of the window), by the words of the protocol."""
    left = {}
    for user, events in enumerate(users):
        drop = {
            ("holdout", "train"): 2,  # the last is for the test, the one before it for validation
            ("holdout", "valid"): 1,
            ("holdout", "test"): 0,
            ("meta", "train"): 1,
            ("meta", "test"): 0,
        }[protocol, name]
        seen = events[: max(0, len(events) - drop)]
        if len(seen) >= 2:  # one to read, one to predict
            left[user] = (seen, seen[-(max_seq_len + 1) :])
    return left


def rows_of(batch: JaggedBatch) -> dict[int, dict[str, list[int]]]:
    """Sequence id -> its part of each column."""
    parts: dict[int, dict[str, list[int]]] = {}
    removed = batch.removed_offsets
    for row, user in enumerate(batch.sequence_ids.tolist()):
        own = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        names = ["item_ids", "next_ids"] + (["times", "next_times"] if batch.times is not None else [])
        parts[user] = {name: getattr(batch, name)[own].tolist() for name in names}
        if removed is not None and batch.removed is not None:
            parts[user]["removed"] = batch.removed[int(removed[row]) : int(removed[row + 1])].tolist()
    return parts


def check_splits(store: Any, users: Users, protocol: Protocol, max_seq_len: int) -> None:
    splits = leave_one_out(store, protocol, max_seq_len)
    assert set(splits) == ({"train", "valid", "test"} if protocol == "holdout" else {"train", "test"})
    for name, split in splits.items():
        expected = windows(users, protocol, name, max_seq_len)
        assert split.sequences.tolist() == list(expected)
        assert split.lengths.tolist() == [len(window) - 1 for _, window in expected.values()]
        assert (split.lengths <= max_seq_len).all()
        for remove in (None, *REMOVALS):
            batch = split.batch(np.arange(len(split))[::-1], remove)
            got = rows_of(batch)
            assert list(got) == list(expected)[::-1]
            assert batch.tokens == sum(len(window) - 1 for _, window in expected.values())
            for user, (seen, window) in expected.items():
                want = {"item_ids": [item for item, _ in window[:-1]], "next_ids": [item for item, _ in window[1:]]}
                if store.has_times:
                    want |= {"times": [time for _, time in window[:-1]], "next_times": [time for _, time in window[1:]]}
                if remove is not None:
                    taken = {"history": seen[:-1], "input": window[:-1], "none": []}[remove]
                    want["removed"] = [item for item, _ in taken]
                assert got[user] == want
        counts = np.zeros(31, int)
        for _, window in expected.values():
            for item, _ in window:
                counts[item] += 1
        assert train_item_counts(split, 30).tolist() == counts.tolist()


@given(
    st.lists(st.integers(0, 9), max_size=8),
    st.sampled_from(["holdout", "meta"]),
    st.sampled_from([1, 2, 3, 7, 200]),
    st.booleans(),
    st.integers(0, 999),
)
@examples(120)
def test_splits_are_those_of_a_loop_over_the_users(
    lengths: list[int], protocol: Protocol, max_seq_len: int, has_times: bool, seed: int
) -> None:
    users = random_users(lengths, seed)
    check_splits(ListStore(users, has_times), users, protocol, max_seq_len)


@pytest.mark.parametrize("has_times", [True, False])
def test_splits_of_prepared_data_are_those_of_a_loop_over_the_users(tmp_path: Path, has_times: bool) -> None:
    users = random_users([3, 1, 9, 2, 4, 12, 1, 6])
    number: dict[int, int] = {}  # prepared ids: 1, 2, ... in the order of first appearance
    lines = [f"u{user},i{item},{time}" for user, events in enumerate(users) for item, time in events]
    users = [[(number.setdefault(item, len(number) + 1), time) for item, time in events] for events in users]
    (tmp_path / "events.csv").write_text("user,item,timestamp\n" + "\n".join(lines) + "\n")
    config = DataConfig(
        name="interactions",
        source=tmp_path / "events.csv",
        dir=tmp_path / "out",
        options={} if has_times else {"timestamp": None},
    )
    store = SequenceStore(prepare(config, log=lambda _: None))
    for protocol in ("holdout", "meta"):
        for max_seq_len in (1, 3, 200):
            check_splits(store, users, protocol, max_seq_len)


def test_the_held_out_events_of_a_protocol_do_not_meet() -> None:
    users = random_users([7])
    splits = leave_one_out(ListStore(users), "holdout", 200)  # type: ignore[arg-type]
    assert {name: int(split.stops[0]) for name, split in splits.items()} == {"train": 5, "valid": 6, "test": 7}
    splits = leave_one_out(ListStore(users), "meta", 200)  # type: ignore[arg-type]
    assert {name: int(split.stops[0]) for name, split in splits.items()} == {"train": 6, "test": 7}


@pytest.mark.parametrize("remove", [None, *REMOVALS])
def test_a_batch_of_no_rows_is_empty(remove: Any) -> None:
    batch = random_split([4, 5]).batch(np.arange(0), remove)
    assert batch.tokens == 0
    assert batch.offsets.tolist() == [0]
    assert {t.dtype for t in vars(batch).values() if t is not None} == {torch.int64}
    assert (batch.removed_offsets is None) == (remove is None)
    moved = batch.to(torch.device("cpu"))
    assert moved.sequence_ids.shape == (0,)


# --- the order of training


@dataclass(frozen=True)
class Case:
    """A training split and how it is cut into batches."""

    lengths: list[int]
    batch_size: int
    batch_tokens: int | None
    seed: int

    def loader(self, rank: int = 0, world: int = 1) -> TrainLoader:
        split = random_split(self.lengths)
        return TrainLoader(
            split, batch_size=self.batch_size, batch_tokens=self.batch_tokens, seed=self.seed, rank=rank, world=world
        )


cases = st.builds(
    Case,
    lengths=st.lists(st.integers(0, 9), max_size=25),
    batch_size=st.integers(1, 8),
    batch_tokens=st.none() | st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
)


@given(cases)
@examples(60)
def test_every_sequence_comes_once_an_epoch_within_the_budgets(case: Case) -> None:
    loader = case.loader()
    for epoch in (0, 1):
        batches = loader.batches(epoch)
        assert sorted(np.concatenate([*batches, np.arange(0)]).tolist()) == list(range(len(loader.split)))
        tokens = [int(loader.split.lengths[rows].sum()) for rows in batches]
        for rows, count in zip(batches, tokens, strict=True):
            assert 1 <= len(rows) <= case.batch_size
            if case.batch_tokens is not None:
                assert count <= case.batch_tokens or len(rows) == 1
        if case.batch_tokens is not None:  # and no batch is closed before it must be
            for (rows, following), count in zip(pairwise(batches), tokens[:-1], strict=True):
                added = int(loader.split.lengths[following[0]])
                assert len(rows) == case.batch_size or count + added > case.batch_tokens
        else:
            assert all(len(rows) == case.batch_size for rows in batches[:-1])


@given(cases, st.integers(1, 5))
@examples(40)
def test_the_ranks_share_each_global_batch(case: Case, world: int) -> None:
    alone = list(case.loader().epoch(3))
    shares = [list(case.loader(rank, world).epoch(3)) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [share[step] for share in shares]  # as many batches on every rank, some of them empty
        assert max(len(p.sequence_ids) for p in parts) - min(len(p.sequence_ids) for p in parts) <= 1
        together: dict[int, dict[str, list[int]]] = {}
        for part in parts:
            together |= rows_of(part)
        assert together == rows_of(whole)
    assert {len(share) for share in shares} == {len(alone)}


@given(cases, st.integers(0, 6))
@examples(30)
def test_an_epoch_resumes_at_any_batch(case: Case, start: int) -> None:
    whole = [rows_of(batch) for batch in case.loader().epoch(2)]
    assert [rows_of(batch) for batch in case.loader().epoch(2, start)] == whole[start:]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    case = Case([6] * 40, batch_size=7, batch_tokens=None, seed=5)
    orders = [np.concatenate(case.loader().batches(epoch)).tolist() for epoch in (0, 1, 2)]
    orders.append(np.concatenate(Case([6] * 40, 7, None, 6).loader().batches(0)).tolist())
    assert len({tuple(order) for order in orders}) == 4
    assert np.concatenate(Case([6] * 40, 3, 11, 5).loader().batches(0)).tolist() == orders[0]
    assert all(order != sorted(order) for order in orders)


def test_the_place_of_a_sequence_in_the_order_does_not_depend_on_the_others() -> None:
    long = random_split([6] * 40)
    few = LeaveOneOut(long.store, long.sequences[10:30], long.starts[10:30], long.stops[10:30], "train")
    order, order_of_few = (
        split.sequences[np.concatenate(TrainLoader(split, batch_size=4, batch_tokens=None, seed=1).batches(0))].tolist()
        for split in (long, few)
    )
    assert order_of_few == [sequence for sequence in order if 10 <= sequence < 30]


def test_every_first_place_is_equally_likely() -> None:
    case = Case([6] * 8, batch_size=8, batch_tokens=None, seed=0)
    firsts = np.bincount([case.loader().batches(epoch)[0][0] for epoch in range(800)], minlength=8)
    assert firsts.min() > 60  # 100 each on average
    assert firsts.max() < 145


def test_share_of_the_sequences_is_nested_and_about_as_large_as_asked() -> None:
    split = random_split([5] * 4000)
    parts = [share_of(split, fraction, seed=3) for fraction in (0.1, 0.4, 1.0)]
    assert [len(part) / 4000 for part in parts] == pytest.approx([0.1, 0.4, 1.0], abs=0.03)
    assert set(parts[0].sequences) < set(parts[1].sequences) < set(parts[2].sequences)
    assert parts[2] is split
    assert set(parts[0].sequences) != set(share_of(split, 0.1, seed=4).sequences)
    kept = np.isin(split.sequences, parts[1].sequences)
    assert np.array_equal(parts[1].starts, split.starts[kept])
    assert np.array_equal(parts[1].stops, split.stops[kept])


def test_a_share_without_sequences_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.fraction: 1e-09 of 40 sequences leaves none for the train split"):
        share_of(random_split([5] * 40), 1e-9, seed=3)
    assert len(share_of(random_split([]), 0.5, seed=3)) == 0  # that no sequence is long enough is said elsewhere
