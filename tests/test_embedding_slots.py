"""Which ids have a row: `SlotMap` against a dict that follows the policy's words."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.embedding.slots import Assignment, Eviction, Seen, SlotMap, SlotPolicy
from npu_rec.errors import TrainingError
from npu_rec.ops.random import random_key

NAME, SEED = "items", 3
KEYS = st.integers(0, 11) | st.integers(0, 90) | st.sampled_from([-1, 2**63 - 1, -(2**63)])
ASKED = st.tuples(KEYS, st.sampled_from([1, 1, 1, 0, 3]))  # an id and its occurrences
STEPS = st.lists(st.tuples(st.integers(1, 3), st.lists(ASKED, max_size=25)), min_size=1, max_size=12)
Steps = list[tuple[int, list[tuple[int, int]]]]


@st.composite
def policies(draw: st.DrawFn) -> SlotPolicy:
    eviction: Eviction = draw(st.sampled_from(["none", "lru", "lfu", "lru", "lfu"]))
    return SlotPolicy(
        limit=draw(st.none() | st.sampled_from([5, 16, 20, 40, 70])),
        eviction=eviction,
        max_age=draw(st.none() | st.integers(1, 6)),
        min_count=draw(st.sampled_from([1, 1, 2, 4])),
        probability=draw(st.sampled_from([1.0, 1.0, 0.5])),
    )


def ids_of(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def assign(slots: SlotMap, step: int, *ids: int) -> Assignment:
    """Every id counts once as often as it stands there."""
    return slots.assign(ids_of(*ids), torch.ones(len(ids), dtype=torch.int64), step)


def resident(slots: SlotMap) -> set[int]:
    return set(slots.seen.map.items()[0].tolist())


def pairs(asked: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Ids and their occurrences."""
    return [key for key, _ in asked], [count for _, count in asked]


def draws_a_row(key: int, step: int, probability: float) -> bool:
    drawn = int(random_key(SEED, "admission", zlib.crc32(NAME.encode()), step, ids_of(key))) % 2**64
    return (drawn >> 11) < probability * 2**53


class Full(Exception):
    """The step needs more rows than there may be."""


@dataclass
class Plain:
    """The policy, an id at a time; both dicts hold (last step, occurrences)."""

    policy: SlotPolicy
    known: frozenset[int] = frozenset()
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)
    evicted: int = 0
    expired: int = 0
    refused: int = 0

    def step(self, asked: list[tuple[int, int]], step: int) -> tuple[set[int], set[int]]:
        """Who is evicted, and who enters."""
        if self.policy.max_age is not None:
            before = len(self.seen)
            self.seen, self.waiting = (
                {key: (last, n) for key, (last, n) in entries.items() if step - last <= self.policy.max_age}
                for entries in (self.seen, self.waiting)
            )
            self.expired += before - len(self.seen)
        wanted = {key for key, _ in asked}
        counts = {key: sum(count for k, count in asked if k == key) for key in wanted}
        entering = {key for key in wanted if key not in self.seen and self._admit(key, counts[key], step)}
        victims = self._victims(len(entering), step, wanted)
        self.seen = {key: entry for key, entry in self.seen.items() if key not in victims}
        for key, count in asked:
            if key in self.seen or key in entering:
                self.seen[key] = (step, self.seen.get(key, (0, 0))[1] + count)
            else:
                self.refused += count
        self.evicted += len(victims)
        return victims, entering

    def _admit(self, key: int, occurrences: int, step: int) -> bool:
        self.waiting[key] = (step, self.waiting.get(key, (0, 0))[1] + occurrences)
        often = self.policy.min_count == 1 or self.waiting[key][1] >= self.policy.min_count
        admitted = (often and draws_a_row(key, step, self.policy.probability)) or key in self.known
        if admitted or self.policy.min_count == 1:  # without counting nobody waits
            del self.waiting[key]
        return admitted

    def _victims(self, entering: int, step: int, wanted: set[int]) -> set[int]:
        limit = self.policy.limit
        needed = 0 if limit is None else len(self.seen) + entering - limit
        if limit is None or needed <= 0 or entering == 0:
            return set()
        idle = [key for key in self.seen if key not in wanted]
        if self.policy.eviction == "none" or len(idle) < needed:
            raise Full
        part = 0 if self.policy.eviction == "lru" else 1
        return set(sorted(idle, key=lambda key: (self.seen[key][part], key))[: max(needed, limit // 16)])


def check_slots(slots: SlotMap, found: Assignment, ids: list[int]) -> None:
    """Every id has its slot, no two share one, and all are below the limit."""
    by_id = dict(zip(*(x.tolist() for x in slots.seen.map.items()), strict=True))
    assert found.slots.tolist() == [by_id.get(key, -1) for key in ids]
    assert len(set(by_id.values())) == len(by_id)
    assert max(by_id.values(), default=-1) < (slots.policy.limit or 2**62)
    assert found.entered_slots.tolist() == [by_id[key] for key in found.entered_ids.tolist()]


@examples(200)
@given(policy=policies(), steps=STEPS, known=st.frozensets(KEYS, max_size=4))
def test_ids_enter_wait_and_leave_as_in_a_dict(policy: SlotPolicy, steps: Steps, known: frozenset[int]) -> None:
    slots, plain, step = SlotMap(policy, NAME, SEED), Plain(policy, known), 0
    held: dict[int, int] = {}

    def admitted(new: Tensor) -> Tensor:
        return torch.tensor([key in known for key in new.tolist()], dtype=torch.bool)

    for gap, asked in steps:
        step += gap
        ids, counts = (torch.tensor(x, dtype=torch.int64) for x in pairs(asked))
        try:
            evicted, entered = plain.step(asked, step)
        except Full:
            with pytest.raises(TrainingError, match=f"table items: .* new ones in step {step} do not fit into the"):
                slots.assign(ids, counts, step, admitted)
            return
        found = slots.assign(ids, counts, step, admitted)
        assert (set(found.evicted_ids.tolist()), set(found.entered_ids.tolist())) == (evicted, entered)
        assert found.evicted_slots.tolist() == [held[key] for key in found.evicted_ids.tolist()]
        check_slots(slots, found, ids.tolist())
        # what is too old may stay until its slot is needed; nobody sees it
        first = -(2**62) if policy.max_age is None else step - policy.max_age
        for entries, expected in ((slots.seen, plain.seen), (slots.waiting, plain.waiting)):
            assert young(entries, first) == expected
        assert (slots.evicted, slots.refused) == (plain.evicted, plain.refused)
        assert slots.expired + len(slots.seen.map) - len(plain.seen) == plain.expired
        held = dict(zip(*(x.tolist() for x in slots.seen.map.items()), strict=True))


def young(entries: Seen, first: int) -> dict[int, tuple[int, int]]:
    """(last step, occurrences) of the ids last seen in step `first` or later."""
    ids, where = entries.map.items()
    rows = zip(ids.tolist(), entries.last_step[where].tolist(), entries.count[where].tolist(), strict=True)
    return {key: (last, count) for key, last, count in rows if last >= first}


@examples(60)
@given(policy=policies(), steps=STEPS, seed=st.integers(0, 2**16))
def test_order_and_grouping_of_a_step_change_nothing(policy: SlotPolicy, steps: Steps, seed: int) -> None:
    listed, grouped, step = SlotMap(policy, NAME, SEED), SlotMap(policy, NAME, SEED), 0
    generator = torch.Generator().manual_seed(seed)
    for gap, asked in steps:
        step += gap
        ids, counts = (torch.tensor(x, dtype=torch.int64) for x in pairs(asked))
        try:
            one = listed.assign(ids, counts, step)
        except TrainingError:
            return
        distinct, place = torch.unique(ids, return_inverse=True)
        totals = torch.zeros_like(distinct).index_add_(0, place, counts)
        order = torch.randperm(len(distinct), generator=generator)
        other = grouped.assign(distinct[order], totals[order], step)
        for name in ("evicted_ids", "evicted_slots", "entered_ids", "entered_slots"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        slots = dict(zip(distinct[order].tolist(), other.slots.tolist(), strict=True))
        assert one.slots.tolist() == [slots[key] for key in ids.tolist()]
        assert (listed.refused, listed.evicted, listed.expired) == (grouped.refused, grouped.evicted, grouped.expired)


def test_the_longest_unseen_leaves_and_the_lower_id_of_two() -> None:
    slots = SlotMap(SlotPolicy(limit=4, eviction="lru"), NAME, SEED)
    assign(slots, 1, 8, 3, 3, 3, 3, 5)
    assign(slots, 2, 4, 8)
    assert assign(slots, 3, 9).evicted_ids.tolist() == [3]
    assert assign(slots, 4, 10).evicted_ids.tolist() == [5]
    assert assign(slots, 5, 11).evicted_ids.tolist() == [4]


def test_the_least_often_seen_leaves_and_the_lower_id_of_two() -> None:
    slots = SlotMap(SlotPolicy(limit=4, eviction="lfu"), NAME, SEED)
    assign(slots, 1, 8, 3, 3, 3, 3, 5)
    assign(slots, 2, 4)
    assert assign(slots, 3, 9).evicted_ids.tolist() == [4]
    assert assign(slots, 4, 10, 10).evicted_ids.tolist() == [5]
    assert assign(slots, 5, 11).evicted_ids.tolist() == [8]
    assert resident(slots) == {3, 9, 10, 11}


def test_a_sixteenth_of_the_slots_is_freed_at_once() -> None:
    slots = SlotMap(SlotPolicy(limit=64, eviction="lru"), NAME, SEED)
    for step in range(64):
        assign(slots, step, step)
    assert assign(slots, 64, 64).evicted_ids.tolist() == [0, 1, 2, 3]
    assert len(assign(slots, 65, 65, 66, 67).evicted_ids) == 0


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_ids_of_the_same_step_are_never_evicted(eviction: Eviction) -> None:
    slots = SlotMap(SlotPolicy(limit=4, eviction=eviction), NAME, SEED)
    assign(slots, 1, 1, 2, 3, 4, 4, 4)
    assert set(assign(slots, 2, 1, 2, 3, 5).evicted_ids.tolist()) == {4}
    with pytest.raises(TrainingError, match=r"4 rows and 1 new ones in step 2 .* the 4 rows of embedding.rows"):
        assign(slots, 2, 6)


def test_without_eviction_the_limit_ends_training_with_advice() -> None:
    slots = SlotMap(SlotPolicy(limit=3), NAME, SEED)
    assign(slots, 1, 1, 2)
    with pytest.raises(TrainingError) as caught:
        assign(slots, 2, 3, 4)
    assert str(caught.value) == (
        "table items: 2 rows and 2 new ones in step 2 do not fit into the 3 rows of embedding.rows on one rank; "
        "set embedding.eviction"
    )


def test_what_is_too_old_leaves_room_before_anybody_is_evicted() -> None:
    slots = SlotMap(SlotPolicy(limit=3, max_age=10), NAME, SEED)
    assign(slots, 1, 1, 2)
    assign(slots, 5, 3)
    found = assign(slots, 12, 4, 5)  # 1 and 2 were not seen for 11 steps
    assert (len(found.evicted_ids), resident(slots)) == (0, {3, 4, 5})
    assert (slots.expired, slots.evicted) == (2, 0)


def test_an_id_gets_a_row_at_its_count_and_counts_anew_when_it_was_away_too_long() -> None:
    slots = SlotMap(SlotPolicy(min_count=3, max_age=4), NAME, SEED)
    assert assign(slots, 1, 7, 7).slots.tolist() == [-1, -1]
    assert assign(slots, 5, 7, 8, 8, 8).slots.tolist() == [0, 1, 1, 1]
    assert assign(slots, 6, 9, 9).slots.tolist() == [-1, -1]
    assert assign(slots, 11, 9).slots.tolist() == [-1]  # five steps later
    assert slots.refused == 5


def test_rows_are_drawn_by_id_and_step_with_the_given_probability() -> None:
    ids = torch.arange(20_000) * 7919
    counts = torch.ones_like(ids)

    def drawn(step: int, name: str = NAME, order: Tensor | None = None) -> set[int]:
        slots = SlotMap(SlotPolicy(probability=0.3), name, SEED)
        asked = ids if order is None else ids[order]
        return set(asked[slots.assign(asked, counts, step).slots >= 0].tolist())

    first = drawn(1)
    assert abs(len(first) - 6000) < 5 * (20_000 * 0.3 * 0.7) ** 0.5
    assert drawn(1, order=torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))) == first
    for other in (drawn(2), drawn(1, "users")):  # draws of their own
        assert abs(len(first & other) - 1800) < 5 * (20_000 * 0.09 * 0.91) ** 0.5
