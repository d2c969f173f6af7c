"""Ranks, best items and likelihoods, a part a rank and a chunk at a time: those of one matrix, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import on_ranks
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, one_thread  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npu_rec.config import EmbeddingConfig
from npu_rec.device import get_device
from npu_rec.distributed import World, open_world
from npu_rec.distributed.world import ALONE
from npu_rec.embedding import TableSpec, build_tables
from npu_rec.evaluation import ranks_of
from npu_rec.models.encoder import unit
from npu_rec.ops.random import random_key
from npu_rec.tasks import scoring
from npu_rec.tasks.catalogue import Catalogue
from npu_rec.tasks.catalogue_part import CataloguePart
from npu_rec.tasks.scoring import Pairs, Scorer

OUT = float("-inf")
DYNAMIC = {"kind": "dynamic", "optimizer": "sgd"}
KINDS: dict[str, dict[str, Any]] = {"static": {}, "dynamic": DYNAMIC}


@dataclass(frozen=True)
class PlainRows(TableSpec):
    """Rows along one axis, of which some are equal, zero or NaN: products with integers are exact, and often tie."""

    def initial_rows(self, ids: Tensor) -> Tensor:
        key = random_key(self.seed, "rows", ids) >> 8
        rows = torch.zeros(ids.shape[0], self.dim).index_put_(
            (torch.arange(ids.shape[0]), key % self.dim), ((key >> 20) % 4 - 1.0)
        )
        return rows.masked_fill_(((key >> 30) % 13 == 0).unsqueeze(1), float("nan"))


@dataclass(frozen=True)
class RealRows(TableSpec):
    """Rows of any direction, each there about twice."""

    def initial_rows(self, ids: Tensor) -> Tensor:
        return super().initial_rows(random_key(self.seed, "rows", ids) % 29)


@dataclass(frozen=True)
class Question:
    """Users with what they ask of a catalogue."""

    users: Tensor
    targets: Tensor
    removed: Pairs

    @staticmethod
    def of(seed: int, users: int, items: int, dim: int, whole: bool = True) -> Question:
        """`whole`: user vectors of integers, and one of NaN."""
        g = generator(seed)
        vectors = (
            torch.randint(-2, 3, (users, dim), generator=g).float() if whole else torch.randn(users, dim, generator=g)
        )
        if whole:
            vectors[torch.rand(users, generator=g) < 0.1] = float("nan")
        lengths = torch.randint(0, items + 1, (users,), generator=g) * (torch.rand(users, generator=g) < 0.6)
        rows = torch.arange(users).repeat_interleave(lengths)
        removed = Pairs(rows, torch.randint(items, rows.shape, generator=g))  # the target and others, even twice
        return Question(vectors, torch.randint(items, (users,), generator=g), removed)

    def part(self, first: int, last: int) -> Question:
        """The users `first` to `last`."""
        here = (self.removed.users >= first) & (self.removed.users < last)
        removed = Pairs(self.removed.users[here] - first, self.removed.columns[here])
        return Question(self.users[first:last], self.targets[first:last], removed)

    def scores(self, vectors: Tensor, keep_targets: bool) -> Tensor:
        """`[U, C]`, with -inf for what is taken out."""
        scores = self.users @ vectors.T
        gone = torch.zeros_like(scores, dtype=torch.bool)
        gone[self.removed.users, self.removed.columns] = True
        if keep_targets:
            gone[torch.arange(len(self.targets)), self.targets] = False
        return scores.masked_fill(gone, OUT)


def catalogue_of(items: int, ranged: bool = True) -> Catalogue:
    return Catalogue(range(1, items + 1) if ranged else torch.arange(items) * 3 + 2)


def vectors_of(spec: TableSpec, catalogue: Catalogue) -> Tensor:
    return unit(spec.initial_rows(catalogue.all_items(torch.device("cpu"))))


def check_best(question: Question, vectors: Tensor, k: int, columns: Tensor, values: Tensor) -> None:
    """The values are those of sorting, and every item stands for its value, once."""
    scores = question.scores(vectors, keep_targets=False)
    scores = scores.masked_fill(scores.isnan(), OUT)
    expected = torch.nn.functional.pad(scores, (0, k), value=OUT).sort(1, descending=True).values[:, :k]
    assert torch.equal(values, expected)
    assert torch.equal(scores.gather(1, columns)[values > OUT], values[values > OUT])
    for row, own in zip(columns, values, strict=True):
        some = row[own > OUT].tolist()
        assert len(set(some)) == len(some)


# --- one process


@given(
    seed=st.integers(0, 10**6),
    users=st.integers(0, 6),
    items=st.integers(1, 40),
    dim=st.integers(1, 5),
    elements=st.integers(1, 150),
    kept=st.booleans(),
    ranged=st.booleans(),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_chunks_rank_like_one_matrix(
    seed: int, users: int, items: int, dim: int, elements: int, kept: bool, ranged: bool, kind: str
) -> None:
    catalogue, question = catalogue_of(items, ranged), Question.of(seed, users, items, dim)
    spec = PlainRows("items", 3 * items + 3, dim, seed)
    tables = build_tables([spec], EmbeddingConfig(**KINDS[kind]), "reference")
    part = CataloguePart(catalogue, tables, "items", ALONE, elements, (1 << 20) * kept)
    scorer, vectors = Scorer(part, ALONE), vectors_of(spec, catalogue)
    for asked in (question, question.part(1, 3)):  # vectors may be kept from the first to the second
        expected = ranks_of(asked.scores(vectors, keep_targets=True), asked.targets)
        assert torch.equal(scorer.ranks(asked.users, asked.targets, asked.removed), expected)
        for k in (1, 7, items + 3):
            check_best(asked, vectors, k, *scorer.top_k(asked.users, k, asked.removed))


def test_equal_items_tie_wherever_they_are() -> None:
    """Scores of an item and its twin, in other chunks than the target and in products of their own, are equal bits."""
    catalogue = catalogue_of(60)
    for seed, (users, dim, width) in enumerate(product((1, 2, 5), (2, 8, 25, 40), (2, 5, 7, 16, 60))):
        question, spec = Question.of(seed, users, 60, dim, whole=False), RealRows("items", 61, dim, seed)
        tables = build_tables([spec], EmbeddingConfig(), "reference")
        scorer = Scorer(CataloguePart(catalogue, tables, "items", ALONE, width * max(users, dim)), ALONE)
        distinct, which = torch.unique(vectors_of(spec, catalogue), dim=0, return_inverse=True)
        assert len(distinct) < 40
        gone = question.scores(distinct[which], keep_targets=True) == OUT
        scores = (question.users.double() @ distinct.double().T)[:, which].masked_fill(gone, OUT)
        expected = ranks_of(scores, question.targets)
        assert torch.equal(scorer.ranks(question.users, question.targets, question.removed), expected)


@pytest.mark.parametrize("width", [1, 7, 60, 1000])
def test_likelihoods_are_those_of_one_softmax(width: int) -> None:
    """In float64, whatever leaves the ranking."""
    catalogue, spec = catalogue_of(60, ranged=False), RealRows("items", 200, 8, 1)
    tables = build_tables([spec], EmbeddingConfig(), "reference")
    scorer = Scorer(CataloguePart(catalogue, tables, "items", ALONE, width * 8), ALONE)
    for users, temperature in product((0, 1, 5), (0.05, 1.0)):
        question = Question.of(users, users, 60, 8, whole=False)
        found = scorer.log_likelihood(unit(question.users), question.targets, temperature)
        expected = likelihoods(question, vectors_of(spec, catalogue), temperature)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def likelihoods(question: Question, vectors: Tensor, temperature: float) -> Tensor:
    scores = unit(question.users).double() @ vectors.double().T / temperature
    return torch.log_softmax(scores, 1).gather(1, question.targets[:, None]).squeeze(1)


def test_a_target_never_overtakes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the same product twice has other bits."""
    noise = generator(0)
    monkeypatch.setattr(scoring, "_product", lambda a, b: a @ b.T + torch.rand(a.shape[0], b.shape[0], generator=noise))
    tables = build_tables([TableSpec("items", 41, 4, 0)], EmbeddingConfig(), "reference")
    scorer = Scorer(CataloguePart(catalogue_of(40), tables, "items", ALONE, 60), ALONE)
    everything = Pairs(torch.arange(5).repeat_interleave(40), torch.arange(40).repeat(5))
    assert scorer.ranks(torch.randn(5, 4, generator=noise), torch.arange(0, 40, 8), everything).tolist() == [1] * 5


def test_a_target_outside_the_catalogue_is_an_error() -> None:
    tables = build_tables([PlainRows("items", 10, 2, 0)], EmbeddingConfig(), "reference")
    scorer = Scorer(CataloguePart(catalogue_of(9), tables, "items", ALONE, 4), ALONE)
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(IndexError, match="not in the catalogue"):
        scorer.ranks(torch.ones(1, 2), torch.tensor([-1]), Pairs(nothing, nothing))
    with pytest.raises(IndexError, match="not in the catalogue"):
        scorer.log_likelihood(torch.ones(1, 2), torch.tensor([-1]), 1.0)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation made; views of others do not count."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_grows_with_the_catalogue(kind: str) -> None:
    items, dim, users, elements = 20_000, 8, 32, 4096
    question = Question.of(0, users, 10, dim)
    tables = build_tables([TableSpec("items", items + 1, dim, 0)], EmbeddingConfig(**KINDS[kind]), "reference")
    scorer = Scorer(CataloguePart(catalogue_of(items), tables, "items", ALONE, elements, 0), ALONE)
    with Largest() as largest:
        scorer.ranks(question.users, question.targets, question.removed)
        scorer.top_k(question.users, 10, question.removed)
        scorer.log_likelihood(question.users, question.targets, 0.05)
    assert elements // 2 < largest.numbers <= elements
    whole = Scorer(CataloguePart(catalogue_of(items), tables, "items", ALONE), ALONE)
    with Largest() as largest:
        whole.ranks(question.users, question.targets, question.removed)
    assert largest.numbers == items * users


# --- several ranks

RANKS = 4
DIM = 5
BATCHES = [(3, 0, 5, 1), (0, 2, 0, 0)]  # users of each rank
K = 9
KEPT, READ_EACH_TIME, ONE_CHUNK = (64, 1 << 20), (100, 0), (1 << 20, 0)

Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A table, what is ranked, and `elements` and `kept_bytes` of a part."""

    table: dict[str, Any]
    limits: tuple[int, int] = READ_EACH_TIME
    items: int = 203
    ranged: bool = True

    def part(self, world: World, rows: type[TableSpec] = PlainRows) -> CataloguePart:
        spec = rows("items", self.items + 1 if self.ranged else 3 * self.items, DIM, seed=4)
        tables = build_tables([spec], EmbeddingConfig(**self.table), "reference", world)
        return CataloguePart(catalogue_of(self.items, self.ranged), tables, "items", world, *self.limits)


CASES = {
    "row-wise": Case({}),
    "row-wise, kept": Case({}, KEPT),
    "row-wise, fewer items than ranks": Case({}, items=3),
    "row-wise, some ids": Case({}, ranged=False),
    "column-wise": Case({"placement": "column_wise", "optimizer": "sgd"}),
    "table-wise": Case({"placement": "table_wise"}, ONE_CHUNK),
    "replicated": Case({"placement": "replicated"}),
    "dynamic": Case(DYNAMIC),
    "replicas": Case({"replicas": 2}),
    "replicas, dynamic": Case({**DYNAMIC, "replicas": 2}, KEPT),
}


def answers(case: Case, world: World) -> list[Answer]:
    """To this rank's users of each batch."""
    scorer, of_real, found = Scorer(case.part(world), world), Scorer(case.part(world, RealRows), world), []
    for seed, batch in enumerate(BATCHES):
        own, real = question(seed, case), question(seed, case, whole=False)
        if world.size > 1:
            mine = sum(batch[: world.rank]), sum(batch[: world.rank + 1])
            own, real = own.part(*mine), real.part(*mine)
        columns, values = scorer.top_k(own.users, K, own.removed)
        found.append({
            "ranks": scorer.ranks(own.users, own.targets, own.removed), "columns": columns, "values": values,
            "likelihoods": of_real.log_likelihood(unit(real.users), real.targets, 0.05),
        })  # fmt: skip
    return found


def question(batch: int, case: Case, whole: bool = True) -> Question:
    return Question.of(batch, sum(BATCHES[batch]), case.items, DIM, whole)


def rank_process(rank: int, store: Path) -> None:
    """One rank: leaves `rank-<r>.pt`, its answers by case."""
    torch.set_num_threads(1)
    found: dict[str, list[Answer]] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RANK", str(rank))
        patched.setenv("WORLD_SIZE", str(RANKS))
        with open_world(get_device("cpu"), timeout=60, init_method=f"file://{store}") as world:
            for name, case in CASES.items():
                found[name] = [*answers(case, world), {"own rows": own_rows(case.part(world))}]
    torch.save(found, store.parent / f"rank-{rank}.pt")


def own_rows(part: CataloguePart) -> Tensor:
    """Share of the part's rows that are on this rank."""
    ids = part.catalogue.items(torch.arange(part.first, part.last))
    return part.tables.tables["items"].owns(ids).double().mean()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Answer]]]:
    """What each rank left."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(RANKS, rank_process, folder / "store")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_answer_like_one(ranks: list[dict[str, list[Answer]]], name: str) -> None:
    case = replace(CASES[name], limits=ONE_CHUNK)
    alone = case.part(ALONE)
    expected, vectors = answers(case, ALONE), vectors_of(alone.tables.tables["items"].spec, alone.catalogue)
    for batch in range(len(BATCHES)):
        pieces = [rank[name][batch] for rank in ranks]
        assert tuple(piece["ranks"].shape[0] for piece in pieces) == BATCHES[batch]
        found = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
        assert torch.equal(found["ranks"], expected[batch]["ranks"])
        assert torch.equal(found["values"], expected[batch]["values"])
        torch.testing.assert_close(found["likelihoods"], expected[batch]["likelihoods"], rtol=1e-5, atol=1e-5)
        check_best(question(batch, case), vectors, K, found["columns"], found["values"])


def test_a_rank_scores_mostly_its_own_rows(ranks: list[dict[str, list[Answer]]]) -> None:
    for name in ("row-wise", "replicas"):
        shares = [float(rank[name][-1]["own rows"]) for rank in ranks]
        assert min(shares) > 0.9, name
