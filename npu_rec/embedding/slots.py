"""Which ids have a row, and in which slot: admission, eviction, age. On the host; it touches no row."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from npu_rec.embedding.key_map import KeyMap
from npu_rec.errors import TrainingError
from npu_rec.ops.random import random_key

Eviction = Literal["none", "lru", "lfu"]
_PART_FREED = 16  # at least a part of this size of the slots is freed at once, so that victims are looked for rarely


@dataclass(frozen=True)
class SlotPolicy:
    """Who gets a slot and who loses it.

    Attributes:
        limit: most slots; None: as many as there are ids.
        eviction: whose slot is taken at the limit: `lru` the longest unseen, `lfu` the least often seen.
        max_age: an id that was not seen for more than this many steps is forgotten; None: never.
        min_count: occurrences before an id gets a row; 1: every id that is looked up, even if it counts for none.
        probability: of getting one, in each step in which it occurs.
    """

    limit: int | None = None
    eviction: Eviction = "none"
    max_age: int | None = None
    min_count: int = 1
    probability: float = 1.0


@dataclass(frozen=True)
class Assignment:
    """`slots [R]` of the ids asked for (-1: not admitted), and who came and went for that.

    Attributes:
        evicted_ids, evicted_slots: `[E]`, there until now.
        entered_ids, entered_slots: `[N]`, new there.
    """

    slots: Tensor
    evicted_ids: Tensor
    evicted_slots: Tensor
    entered_ids: Tensor
    entered_slots: Tensor


class Seen:
    """Ids in slots, with the step in which each was last seen and how often it was in all."""

    def __init__(self) -> None:
        self.map = KeyMap()
        self.last_step = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.count = torch.zeros(0, dtype=torch.int64, device="cpu")

    def insert(self, ids: Tensor, last_step: Tensor | int = 0, count: Tensor | int = 0) -> Tensor:
        """Slots of distinct new `ids [N]`."""
        slots = self.map.insert(ids)
        if self.map.slot_limit > self.count.shape[0]:
            more = torch.zeros(max(self.map.slot_limit, 2 * self.count.shape[0]), dtype=torch.int64)
            more[: self.count.shape[0]] = self.count
            self.count = more
            more = torch.zeros_like(more)
            more[: self.last_step.shape[0]] = self.last_step
            self.last_step = more
        self.last_step[slots], self.count[slots] = last_step, count
        return slots

    def touch(self, slots: Tensor, counts: Tensor, step: int) -> None:
        """They, which may repeat, were seen in `step`."""
        self.last_step[slots] = step
        self.count.index_add_(0, slots, counts)

    def forget_before(self, step: int) -> int:
        """Drop the ids last seen before `step`; how many."""
        ids, slots = self.map.items()
        old = ids[self.last_step[slots] < step]
        self.map.erase(old)
        return old.shape[0]


class SlotMap:
    """Ids to slots, by a policy.

    Attributes:
        seen: the ids with a slot.
        waiting: ids that occurred, but too seldom so far.
        evicted, expired, refused: totals: slots taken, ids forgotten for their age, occurrences without a row.
    """

    def __init__(self, policy: SlotPolicy, name: str, seed: int) -> None:
        self.policy, self.name, self.seed = policy, name, seed
        self.evicted = self.expired = self.refused = 0
        self.clear()

    def clear(self) -> None:
        """Forget all ids."""
        self.seen, self.waiting = Seen(), Seen()

    def assign(
        self, ids: Tensor, counts: Tensor, step: int, admitted: Callable[[Tensor], Tensor] | None = None
    ) -> Assignment:
        """Slots for `ids [R]`, which may repeat, with their `counts [R]`, in step `step`.

        Args:
            admitted: says of distinct ids `[N]` which need no admission, `[N]` bool.

        Raises:
            TrainingError: there are more ids than slots.
        """
        slots = self._find(ids, step)
        missing = slots < 0
        none = ids[:0]
        evicted, entered = (none, none), (none, none)
        if bool(missing.any()):
            self.seen.last_step[slots[~missing]] = step  # those are not to be evicted now
            new, place = torch.unique(ids[missing], return_inverse=True)
            occurrences = torch.zeros_like(new).index_add_(0, place, counts[missing])
            entering = self._admit(new, occurrences, step, admitted)
            evicted = self._make_room(int(entering.sum()), step)
            found = torch.full_like(new, -1)
            found[entering] = self.seen.insert(new[entering])
            slots[missing] = found[place]
            entered = new[entering], found[entering]
        resident = slots >= 0
        self.refused += int(counts[~resident].sum())
        self.seen.touch(slots[resident], counts[resident], step)
        return Assignment(slots, *evicted, *entered)

    def _find(self, ids: Tensor, step: int) -> Tensor:
        """Slots of those that are there and not too old."""
        slots = self.seen.map.find(ids)
        age = self.policy.max_age
        if age is None:
            return slots
        if step % max(1, age) == 0:  # all others that are too old, to have their slots
            self.expired += self.seen.forget_before(step - age)
            self.waiting.forget_before(step - age)
            return self.seen.map.find(ids)
        old = torch.unique(ids[slots >= 0])
        old = old[self.seen.last_step[self.seen.map.find(old)] < step - age]
        if old.shape[0]:
            self.seen.map.erase(old)
            self.expired += old.shape[0]
            return self.seen.map.find(ids)
        return slots

    def _admit(
        self, new: Tensor, occurrences: Tensor, step: int, admitted: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Which of the distinct ids `new [N]`, with their `occurrences` now, get a slot: `[N]` bool."""
        policy = self.policy
        may = torch.ones_like(new, dtype=torch.bool)
        if policy.min_count > 1:
            may &= self._count_up(new, occurrences, step) >= policy.min_count
        if policy.probability < 1.0:
            key = random_key(self.seed, "admission", zlib.crc32(self.name.encode()), step, new)
            may &= (key >> 11) & (2**53 - 1) < int(policy.probability * 2**53)
        if admitted is not None:
            may |= admitted(new)
        if policy.min_count > 1:
            self.waiting.map.erase(new[may & (self.waiting.map.find(new) >= 0)])
        return may

    def _count_up(self, new: Tensor, occurrences: Tensor, step: int) -> Tensor:
        """Occurrences so far, `[N]`, of ids that wait."""
        slots = self.waiting.map.find(new)
        if self.policy.max_age is not None:
            known = slots >= 0
            old = known.clone()
            old[known] = self.waiting.last_step[slots[known]] < step - self.policy.max_age
            self.waiting.map.erase(new[old])
            slots[old] = -1
        slots[slots < 0] = self.waiting.insert(new[slots < 0])
        self.waiting.touch(slots, occurrences, step)
        return self.waiting.count[slots]

    def _make_room(self, entering: int, step: int) -> tuple[Tensor, Tensor]:
        """Ids and slots that are taken so that `entering` more find one."""
        limit, seen = self.policy.limit, self.seen
        none = torch.zeros(0, dtype=torch.int64)
        if limit is not None and self.policy.max_age is not None and len(seen.map) + entering > limit:
            self.expired += seen.forget_before(step - self.policy.max_age)  # no slot for them while others need one
        if limit is None or len(seen.map) + entering <= limit:
            return none, none
        needed = len(seen.map) + entering - limit
        ids, slots = seen.map.items()
        idle = seen.last_step[slots] < step
        ids, slots = ids[idle], slots[idle]
        if self.policy.eviction == "none" or ids.shape[0] < needed:
            advice = "set embedding.eviction" if self.policy.eviction == "none" else "raise it, or make batches smaller"
            raise TrainingError(
                f"table {self.name}: {len(seen.map):,} rows and {entering:,} new ones in step {step} do not fit into "
                f"the {limit:,} rows of embedding.rows on one rank; {advice}"
            )
        taken = min(max(needed, limit // _PART_FREED), ids.shape[0])
        worth = seen.last_step[slots] if self.policy.eviction == "lru" else seen.count[slots]
        chosen = _lowest(worth, ids, taken)
        self.evicted += taken
        return ids[chosen], seen.map.erase(ids[chosen])


def _lowest(worth: Tensor, ids: Tensor, count: int) -> Tensor:
    """Places of the `count` least worth, equal ones by id."""
    border = worth.kthvalue(count).values
    below, tied = torch.nonzero(worth < border).squeeze(1), torch.nonzero(worth == border).squeeze(1)
    tied = tied[torch.argsort(ids[tied])]
    return torch.cat([below, tied[: count - below.shape[0]]])
