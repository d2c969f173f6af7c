"""Users against every item of a catalogue: exact ranks, the best items and likelihoods, in bounded memory.

Each rank scores the users of all ranks against its part of the columns, a chunk of them at a time, so that it reads the
vectors of that part alone. What travels are user vectors, and of each user a score, a count, or the best items of each
part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from npu_rec.distributed import World
from npu_rec.evaluation.ranking import is_ahead, ranks_of
from npu_rec.tasks.catalogue_part import CataloguePart

OUT = float("-inf")
_WIDEST = 1 << 14  # columns of a chunk: near enough to the processor, and one chunk more (`_own_scores`) is little
_NARROWEST = 2  # a product with one row or column sums in another order, and equal items would not tie


@dataclass(frozen=True)
class Pairs:
    """Rows of users `[n]` and a column of each `[n]`, int64."""

    users: Tensor
    columns: Tensor


class Scorer:
    """Ranks, best items and likelihoods for users of all ranks; collective, and ranks may differ in B, even 0.

    Users are `[B, E]` float32 vectors of length 1; `removed` are items that leave their ranking.
    """

    def __init__(self, part: CataloguePart, world: World) -> None:
        self.part, self.world = part, world
        self.items = len(part.catalogue)

    @torch.no_grad()
    def ranks(self, users: Tensor, targets: Tensor, removed: Pairs) -> Tensor:
        """Rank of each user's target, `[B]` int64, as `ranks_of` defines it.

        Args:
            targets: `[B]` int64 columns; they stay in the ranking.

        Raises:
            IndexError: a target is not in the catalogue.
        """
        if self._fits(users):
            scores, gone = self._matrix(users, removed)
            return ranks_of(scores.masked_fill_(gone.scatter_(1, targets.unsqueeze(1), False), OUT), targets)
        counts = self.world.all_gather(users.shape[0], "how many users")
        everyone, targets = self._of_all_ranks(users, counts, "user vectors"), self._targets(targets, counts)
        removed = self._to_owners(removed, counts)
        own = self._own_scores(everyone, targets)
        held_out = iter(self._by_chunk(everyone, Pairs(_count(everyone), targets)))
        ahead = torch.zeros_like(targets)
        for first, scores in self._chunks(everyone, removed):
            here = next(held_out)
            scores[here.users, here.columns - first] = own[here.users]  # computed with others beside it
            ahead += is_ahead(scores, first + _count(scores.T), own, targets).sum(1)
        return self._to_users(ahead, counts, "ranks").sum(0) + 1

    @torch.no_grad()
    def top_k(self, users: Tensor, k: int, removed: Pairs) -> tuple[Tensor, Tensor]:
        """(columns `[B, k]` int64, scores `[B, k]`) of each user's best items, best first; ties are in any order.

        Where items run out, and in the place of those without a score (NaN), the score is -inf.
        """
        if self._fits(users):
            scores, gone = self._matrix(users, removed)
            return _best(scores.masked_fill_(gone | _nan(scores), OUT), None, k)
        counts = self.world.all_gather(users.shape[0], "how many users")
        everyone = self._of_all_ranks(users, counts, "user vectors")
        removed = self._to_owners(removed, counts)
        values = everyone.new_full((everyone.shape[0], k), OUT)
        columns = torch.zeros_like(values, dtype=torch.int64)
        for first, scores in self._chunks(everyone, removed):
            places, best = _best(scores.masked_fill_(_nan(scores), OUT), None, k)
            columns, values = _best(torch.cat([values, best], 1), torch.cat([columns, first + places], 1), k)
        parts = self._to_users(columns, counts, "best items"), self._to_users(values, counts, "their scores")
        columns, values = (torch.cat(list(x), 1) for x in parts)
        return _best(values, columns, k)

    @torch.no_grad()
    def log_likelihood(self, users: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Logarithm of each target's share in the softmax of all scores / temperature, `[B]` float32.

        Args:
            targets: `[B]` int64 columns.

        Raises:
            IndexError: a target is not in the catalogue.
        """
        counts = self.world.all_gather(users.shape[0], "how many users")
        everyone, targets = self._of_all_ranks(users, counts, "user vectors"), self._targets(targets, counts)
        own: Tensor = self._own_scores(everyone, targets).split(counts)[self.world.rank]
        total = everyone.new_full((everyone.shape[0],), OUT)
        for _, scores in self._chunks(everyone, Pairs(targets[:0], targets[:0])):
            total = torch.logaddexp(total, torch.logsumexp(scores.div_(temperature), 1))
        return own / temperature - torch.logsumexp(self._to_users(total, counts, "sums over items"), 0)

    # --- all scores at once

    def _fits(self, users: Tensor) -> bool:
        return self.world.size == 1 and self.items * max(users.shape) <= self.part.elements

    def _matrix(self, users: Tensor, removed: Pairs) -> tuple[Tensor, Tensor]:
        """All scores `[B, C]`, and which of them are taken out."""
        ((_, vectors),) = self.part.chunks(self.items, users.device)
        scores = _product(users, vectors)
        gone = torch.zeros_like(scores, dtype=torch.bool)
        gone[removed.users, removed.columns] = True
        return scores, gone

    # --- a chunk of columns at a time

    def _width(self, users: Tensor) -> int:
        """Columns of a chunk, the same on all ranks; so all products have one shape, and equal items tie."""
        most = max(1, min(_WIDEST, self.part.elements // max(users.shape)))
        chunks = -(-self.part.size // most)
        return max(_NARROWEST, -(-self.part.size // chunks))

    def _chunks(self, users: Tensor, removed: Pairs) -> Iterator[tuple[int, Tensor]]:
        """First column and scores `[U, n]` of each chunk of the part; -inf where taken out."""
        gone = iter(self._by_chunk(users, removed))
        for first, vectors in self.part.chunks(self._width(users), users.device):
            scores = self._scores(users, vectors)
            here = next(gone)
            scores[here.users, here.columns - first] = OUT
            yield first, scores

    def _by_chunk(self, users: Tensor, pairs: Pairs) -> list[Pairs]:
        """The pairs in each chunk of the part, sorted on the host."""
        columns, order = pairs.columns.cpu().sort()
        ends = [*range(self.part.first, self.part.last, self._width(users)), self.part.last]
        cuts = torch.searchsorted(columns, torch.tensor(ends)).tolist()
        rows, columns = pairs.users.cpu()[order].to(users.device), columns.to(users.device)
        return [Pairs(rows[a:b], columns[a:b]) for a, b in pairwise(cuts)]

    def _scores(self, users: Tensor, vectors: Tensor) -> Tensor:
        """`[U, n]` of `vectors [n, E]`, by a product of the shape that all have."""
        scores = _product(_at_least(_NARROWEST, users), _at_least(self._width(users), vectors))
        return scores[: users.shape[0], : vectors.shape[0]]

    def _own_scores(self, users: Tensor, targets: Tensor) -> Tensor:
        """`[U]`, on all ranks: each user's score of the target, computed where its column is."""
        here = ((targets >= self.part.first) & (targets < self.part.last)).nonzero().squeeze(1)
        vectors, width = self.part.vectors(targets[here]), self._width(users)
        own = users.new_zeros(users.shape[0])
        for some, rows in zip(here.split(width), vectors.split(width), strict=True):
            own[some] = self._scores(users, rows)[some, _count(some)]
        return self.world.all_reduce(own, "scores of the held-out items")

    # --- to and from other ranks

    def _of_all_ranks(self, rows: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """`rows` of all ranks, of which each has `counts`."""
        size = self.world.size
        return self.world.all_to_all(torch.cat([rows] * size), [rows.shape[0]] * size, counts, what)

    def _targets(self, targets: Tensor, counts: Sequence[int]) -> Tensor:
        """Those of all ranks."""
        everyone = self._of_all_ranks(targets, counts, "held-out items")
        if bool((everyone.cpu() < 0).any()):
            raise IndexError("a held-out item is not in the catalogue")
        return everyone

    def _to_owners(self, pairs: Pairs, counts: Sequence[int]) -> Pairs:
        """The pairs of all ranks in this rank's columns, on the host, users counted through (`counts` of each rank)."""
        world, columns = self.world, pairs.columns.cpu()
        users = pairs.users.cpu() + sum(counts[: world.rank])
        owners = torch.tensor(self.part.owners)[columns // self.part.size]
        send = torch.bincount(owners, minlength=world.size)
        ones = [1] * world.size
        receive = world.all_to_all(send, ones, ones, "how many items are removed").tolist()
        message = torch.stack([users, columns], 1)[torch.argsort(owners)]
        return Pairs(*world.all_to_all(message, send.tolist(), receive, "removed items").unbind(1))

    def _to_users(self, values: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """`[U, ...]` of each part -> `[parts, B, ...]` of this rank's users."""
        own = counts[self.world.rank]
        arrived = self.world.all_to_all(values, counts, [own] * self.world.size, what)
        return arrived.view(self.world.size, own, *values.shape[1:])


def _product(users: Tensor, vectors: Tensor) -> Tensor:
    with torch.autocast(users.device.type, enabled=False):  # in bfloat16 near items would tie
        return users @ vectors.T


def _at_least(rows: int, x: Tensor) -> Tensor:
    """`x [n, E]`, with zeros below if it has fewer rows."""
    return x if x.shape[0] >= rows else pad(x, (0, 0, 0, rows - x.shape[0]))


def _nan(x: Tensor) -> Tensor:
    """`isnan` by an operator that every card has."""
    return x != x


def _count(rows: Tensor) -> Tensor:
    """0, 1, 2, ... for each row."""
    return torch.arange(rows.shape[0], device=rows.device)


def _best(scores: Tensor, columns: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Columns (None: they are counted) and scores of the best k, filled up with -inf, `[B, k]` each."""
    some = min(k, scores.shape[1])
    best = scores.topk(some, dim=1)
    places = best.indices if columns is None else columns.gather(1, best.indices)
    return pad(places, (0, k - some)), pad(best.values, (0, k - some), value=OUT)
