"""Stochastic Length: lengths and events against the rule in plain words, and the batches that come of it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, one_thread  # noqa: F401
from test_data_splits import ListStore, random_users, rows_of

from npu_rec.data.loader import TrainLoader
from npu_rec.data.splits import leave_one_out, windows_batch
from npu_rec.data.stochastic_length import StochasticLength, age_weights, make_stochastic_length
from npu_rec.distributed.balance import SequenceCost
from npu_rec.errors import ConfigError

SELECTIONS = ("recent", "random", "weighted")


def rule_of(alpha: float, max_seq_len: int, selection: Any = "recent", seed: int = 3) -> StochasticLength:
    return StochasticLength(alpha, max_seq_len, seed, selection)


@pytest.mark.parametrize(
    ("alpha", "max_seq_len", "power"),
    [
        (1.6, 1024, 256.0),
        (1.6, 2048, 445.7),
        (1.6, 4096, 776.0),
        (1.6, 8192, 1351.2),
        (1.8, 1024, 512.0),
        (1.8, 2048, 955.4),
        (1.8, 4096, 1782.9),
        (1.8, 8192, 3327.0),
    ],
)
def test_the_threshold_is_that_of_the_paper(alpha: float, max_seq_len: int, power: float) -> None:
    rule = rule_of(alpha, max_seq_len)
    assert max_seq_len ** (alpha / 2) == pytest.approx(power, abs=0.05)
    assert rule.part == int(max_seq_len ** (alpha / 2) + 1e-9)
    chances = rule.probability_whole(np.array([rule.part, rule.part + 1, max_seq_len]))
    assert chances[0] == 1.0
    assert chances[1:].tolist() == pytest.approx(
        [max_seq_len**alpha / (rule.part + 1) ** 2, max_seq_len ** (alpha - 2)]
    )


@given(
    st.floats(1.01, 2.0),
    st.integers(1, 5000),
    st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    st.integers(0, 9),
)
@examples(40)
def test_lengths_have_the_mean_of_the_rule(alpha: float, max_seq_len: int, lengths: list[int], epoch: int) -> None:
    rule, draws = rule_of(alpha, max_seq_len), 4000
    for n in (min(n, max_seq_len) for n in lengths):
        part = max_seq_len ** (alpha / 2)
        chance = 1.0 if n <= part else max_seq_len**alpha / n**2
        found = rule.lengths(epoch, np.arange(draws), np.full(draws, n))
        assert set(found.tolist()) <= {n, min(n, rule.part)}
        whole = float((found == n).mean())
        assert abs(whole - chance) <= 5 * (chance * (1 - chance) / draws) ** 0.5 + 1 / draws


def test_lengths_are_drawn_anew_in_every_epoch_and_for_every_seed() -> None:
    sequences, lengths = np.arange(200), np.full(200, 30)
    draws = [rule_of(1.5, 40, seed=seed).lengths(epoch, sequences, lengths) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(drawn.tolist()) for drawn in draws}) == 4


def test_alpha_2_reads_everything() -> None:
    lengths = np.arange(65)
    assert rule_of(2.0, 64).lengths(0, lengths, lengths).tolist() == lengths.tolist()


@pytest.mark.parametrize("alpha", [1.0, 2.1, float("nan")])
def test_an_alpha_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be in"):
        rule_of(alpha, 64)


# --- which events stay


def inclusion(weights: list[float], count: int) -> dict[tuple[int, ...], float]:
    """Chance of every set of `count` places, drawn one after the other by weight without replacement."""
    chances: Counter[tuple[int, ...]] = Counter()
    for order in permutations(range(len(weights)), count):
        chance, left = 1.0, sum(weights)
        for place in order:
            chance *= weights[place] / left
            left -= weights[place]
        chances[tuple(sorted(order))] += chance
    return chances


@pytest.mark.parametrize("times", [[0, 10, 70, 75, 80], [5, 5, 5, 5, 9]])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_sets_of_events_are_as_likely_as_a_count_of_all_says(selection: str, times: list[int]) -> None:
    n, count, draws = 5, 2, 6000
    rule = rule_of(1.01, n, selection)
    assert rule.part == count
    ages = [times[-1] - time for time in times]
    weights = [1 - age / sum(ages) for age in ages] if selection == "weighted" else [1.0] * n
    chances = {(3, 4): 1.0} if selection == "recent" else inclusion(weights, count)
    window = np.array([*times, times[-1] + 1])  # one more, to predict
    kept = rule.kept(0, np.arange(draws), np.full(draws, n + 1), np.tile(window, draws)).reshape(draws, n + 1)
    assert kept[:, -1].all()
    in_part = kept[kept.sum(1) == count + 1]
    assert 0.6 * draws < len(in_part) < draws
    found = Counter(tuple(np.flatnonzero(row[:-1]).tolist()) for row in in_part)
    assert set(found) <= {places for places, chance in chances.items() if chance > 0}
    for places, chance in chances.items():
        assert abs(found[places] / len(in_part) - chance) <= 5 * (chance * (1 - chance) / len(in_part)) ** 0.5


def test_weights_fall_with_age() -> None:
    assert age_weights(np.array([0, 6, 9, 10])).tolist() == pytest.approx([1 - 10 / 15, 1 - 4 / 15, 1 - 1 / 15, 1])
    assert age_weights(np.array([7, 7, 7])).tolist() == [1, 1, 1]
    assert age_weights(np.array([7])).tolist() == [1]


def test_an_event_of_weight_0_stays_where_all_others_do() -> None:
    rule = rule_of(1.999, 4, "weighted")
    assert rule.part == 3
    chosen = rule._choose(0, 0, 4, 3, np.array([0, 9, 9, 9]))
    assert sorted(chosen.tolist()) == [1, 2, 3]  # the oldest has all the age
    assert sorted(rule._choose(0, 0, 2, 2, np.array([0, 9])).tolist()) == [0, 1]


# --- batches


class Case:
    """A training split and its rule."""

    def __init__(self, lengths: list[int], selection: str, seed: int, max_seq_len: int = 7) -> None:
        self.users = random_users(lengths, seed)
        self.max_seq_len = max_seq_len
        store: Any = ListStore(self.users, has_times=selection == "weighted")
        self.split = leave_one_out(store, "meta", max_seq_len)["train"]
        self.rule = rule_of(1.3, max_seq_len, selection, seed)  # 7^0.65: three events
        self.has_times = store.has_times

    def loader(self, rank: int = 0, world: int = 1, **options: Any) -> TrainLoader:
        settings = {"batch_size": 5, "batch_tokens": 12} | options
        rule = settings.pop("rule", self.rule)
        return TrainLoader(self.split, seed=1, rank=rank, world=world, stochastic_length=rule, **settings)


cases = st.builds(
    Case, st.lists(st.integers(0, 12), max_size=20), st.sampled_from(SELECTIONS), st.integers(0, 2**31), st.just(7)
)


@given(cases, st.integers(0, 3))
@examples(60)
def test_each_event_that_stays_predicts_the_next_that_stays(case: Case, epoch: int) -> None:
    loader, found = case.loader(), {}
    for batch in loader.epoch(epoch):
        found |= rows_of(batch)
    assert sorted(found) == case.split.sequences.tolist()
    for user, length in zip(case.split.sequences.tolist(), loader.lengths(epoch).tolist(), strict=True):
        window = case.users[user][:-1][-case.max_seq_len - 1 :]
        times = np.array([time for _, time in window]) if case.has_times else None
        alone = case.rule.kept(epoch, np.array([user]), np.array([len(window)]), times)  # without the others
        kept = [event for event, stays in zip(window, alone, strict=True) if stays]
        assert len(kept) == length + 1
        assert kept[-1] == window[-1]
        want = {"item_ids": [item for item, _ in kept[:-1]], "next_ids": [item for item, _ in kept[1:]]}
        if case.has_times:
            want |= {"times": [time for _, time in kept[:-1]], "next_times": [time for _, time in kept[1:]]}
        assert found[user] == want


@given(cases)
@examples(40)
def test_budgets_hold_for_what_is_read(case: Case) -> None:
    loader = case.loader()
    lengths = loader.lengths(1)
    batches = loader.batches(1)
    assert sorted(np.concatenate([*batches, np.arange(0)]).tolist()) == list(range(len(case.split)))
    assert [batch.tokens for batch in loader.epoch(1)] == [int(lengths[rows].sum()) for rows in batches]
    for rows in batches:
        assert lengths[rows].sum() <= 12
    for rows, following in pairwise(batches):
        assert len(rows) == 5 or lengths[rows].sum() + lengths[following[0]] > 12


@given(cases, st.integers(1, 4))
@examples(30)
def test_ranks_together_read_what_one_reads(case: Case, world: int) -> None:
    given_lengths = []

    def share(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
        given_lengths.append(lengths)
        return SequenceCost(1.0, 1.0).share(lengths, ranks)

    alone = [rows_of(batch) for batch in case.loader().epoch(2)]
    shares = [[rows_of(b) for b in case.loader(rank, world, share=share).epoch(2)] for rank in range(world)]
    for step, whole in enumerate(alone):
        together: dict[int, dict[str, list[int]]] = {}
        for own in shares:
            together |= own[step]
        assert together == whole
    read = case.loader().lengths(2)
    if world > 1:
        wanted = [read[rows].tolist() for rows in case.loader().batches(2)]
        assert [lengths.tolist() for lengths in given_lengths] == wanted * world


@given(cases, st.integers(0, 5))
@examples(20)
def test_an_epoch_resumes_at_any_batch(case: Case, start: int) -> None:
    whole = [rows_of(batch) for batch in case.loader().epoch(1)]
    assert [rows_of(batch) for batch in case.loader().epoch(1, start)] == whole[start:]


@given(cases)
@examples(20)
def test_batches_do_not_change_what_is_read(case: Case) -> None:
    found: list[dict[int, Any]] = [{}, {}]
    for i, size in enumerate((2, 9)):
        for batch in case.loader(batch_size=size, batch_tokens=None).epoch(0):
            found[i] |= rows_of(batch)
    assert found[0] == found[1]


def test_alpha_2_and_short_sequences_give_the_batches_of_old() -> None:
    case = Case([3, 4, 9, 12], "random", 0)
    plain = [rows_of(batch) for batch in case.loader(rule=None).epoch(0)]
    assert [rows_of(batch) for batch in case.loader(rule=rule_of(2.0, 7, "random")).epoch(0)] == plain
    short = Case([2, 3, 4], "random", 0)  # one, two or three events after the split
    plain = [rows_of(batch) for batch in short.loader(rule=None).epoch(0)]
    assert [rows_of(batch) for batch in short.loader().epoch(0)] == plain


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_batch_of_nothing_and_of_one_event_each(selection: Any) -> None:
    rule = rule_of(1.2, 1, selection)
    assert rule.part == 1

    def choice(sequences: np.ndarray, sizes: np.ndarray, times: np.ndarray | None) -> np.ndarray:
        return rule.kept(0, sequences, sizes, times)

    nothing = np.arange(0)
    empty = windows_batch(nothing, nothing, nothing, nothing, choice)
    assert (empty.tokens, empty.offsets.tolist()) == (0, [0])
    ones = windows_batch(np.arange(2), np.array([2, 2]), np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4]), choice)
    assert rows_of(ones)[1] == {"item_ids": [3], "next_ids": [4], "times": [3], "next_times": [4]}
    two = rule_of(1.01, 2, selection)  # of two events one stays: that before the last, or the first
    batch = windows_batch(
        np.arange(50),
        np.full(50, 3),
        np.tile([1, 2, 3], 50),
        np.tile([1, 2, 3], 50),
        lambda sequences, sizes, times: two.kept(0, sequences, sizes, times),
    )
    assert {tuple(row["item_ids"]) for row in rows_of(batch).values()} >= {(1, 2), (2,)}
    assert all(row["next_ids"][-1] == 3 for row in rows_of(batch).values())


def test_choosing_by_age_needs_times() -> None:
    settings: dict[str, Any] = {"max_seq_len": 9, "seed": 0, "has_times": False}
    assert make_stochastic_length(None, "weighted", **settings) is None
    assert make_stochastic_length(1.5, "random", **settings) == StochasticLength(1.5, 9, 0, "random")
    with pytest.raises(ConfigError, match=r"train.stochastic_selection: weighted .* no times; set it to random or rec"):
        make_stochastic_length(1.5, "weighted", **settings)
