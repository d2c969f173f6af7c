"""Ranks and ranking metrics, against sorting by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, one_thread  # noqa: F401
from torch import Tensor

from npu_rec import registry
from npu_rec.errors import ConfigError
from npu_rec.evaluation import compute_metrics, ranks_of
from npu_rec.evaluation.predictions import prediction_metric
from npu_rec.registry import register
from npu_rec.train import load_run_config

INFINITY = float("inf")


@given(
    st.integers(1, 12).flatmap(
        lambda width: st.lists(
            st.tuples(
                # few different values: ties; -inf: items out of the ranking
                st.lists(st.sampled_from([-INFINITY, -1.5, 0.0, 0.25, 3.0]), min_size=width, max_size=width),
                st.integers(0, width - 1),
            ),
            max_size=5,
        )
    )
)
@examples(60)
def test_ranks_are_the_places_in_a_stable_descending_sort(rows: list[tuple[list[float], int]]) -> None:
    width = len(rows[0][0]) if rows else 3
    scores = torch.tensor([row for row, _ in rows]).view(-1, width)
    targets = torch.tensor([target for _, target in rows], dtype=torch.int64)
    expected = [sorted(range(width), key=lambda c, row=row: (-row[c], c)).index(target) + 1 for row, target in rows]
    assert ranks_of(scores, targets).tolist() == expected


def test_a_score_that_is_not_a_number_never_wins() -> None:
    nan = float("nan")
    scores = torch.tensor([[nan, nan, nan], [0.1, nan, 0.3], [nan, 0.2, 0.3]])
    ranks = ranks_of(scores, torch.tensor([0, 1, 2]))
    assert (ranks > torch.tensor([3, 3, 1])).all()
    assert compute_metrics(ranks[:2], ["hr@3"]) == {"hr@3": 0.0}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 45))
@examples(60)
def test_metrics_equal_their_definitions(ranks: list[int], k: int) -> None:
    values = compute_metrics(torch.tensor(ranks), [f"hr@{k}", f"ndcg@{k}", f"mrr@{k}", "mrr"])
    users = len(ranks)
    expected = {
        f"hr@{k}": sum(rank <= k for rank in ranks) / users,
        f"ndcg@{k}": sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k) / users,
        f"mrr@{k}": sum(1 / rank for rank in ranks if rank <= k) / users,
        "mrr": sum(1 / rank for rank in ranks) / users,
    }
    assert values == pytest.approx(expected, rel=1e-12)
    assert list(values) == list(expected)
    assert all(type(value) is float for value in values.values())


def test_metrics_of_no_users_are_zero() -> None:
    names = ["hr@10", "ndcg@10", "mrr", "mrr@3"]
    assert compute_metrics(torch.zeros(0, dtype=torch.int64), names) == dict.fromkeys(names, 0.0)


def test_metrics_of_many_users_do_not_drift() -> None:
    ranks = torch.full((300_000,), 7)
    assert compute_metrics(ranks, ["mrr"])["mrr"] == pytest.approx(1 / 7, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hr@0", "'hr@0': expected name@k with a positive k"),
        ("hr@-1", "'hr@-1': expected name@k"),
        ("hr@x", "'hr@x': expected name@k"),
        ("hr@", "'hr@': expected name@k"),
        ("hr@1.5", "'hr@1.5': expected name@k"),
        ("hr@²", "'hr@²': expected name@k"),
        ("hr", "eval.metrics: 'hr' needs a cut, such as hr@10"),
        ("ndcg", "eval.metrics: 'ndcg' needs a cut, such as ndcg@10"),
        ("ndgc@10", "no metric is registered as 'ndgc'; did you mean 'ndcg'?"),
    ],
)
def test_a_metric_that_does_not_exist_is_refused(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compute_metrics(torch.tensor([1]), [name])
    assert expected in str(caught.value)


@pytest.fixture
def own_metric() -> Iterator[list[int | None]]:
    """Registers `median` for one test; the list holds the k of each call."""
    seen: list[int | None] = []

    @register("metric", "median")
    def median(ranks: Tensor, k: int | None) -> float:
        seen.append(k)
        return float(ranks.double().median())

    yield seen
    del registry._entries["metric"]["median"]


def test_an_own_metric_is_called_with_its_k(own_metric: list[int | None]) -> None:
    assert compute_metrics(torch.tensor([3, 1, 8]), ["median@5", "median", "hr@3"]) == {
        "median@5": 3.0,
        "median": 3.0,
        "hr@3": pytest.approx(2 / 3),
    }
    assert own_metric == [5, None]


def test_a_metric_name_is_taken_once(own_metric: list[int | None]) -> None:
    with pytest.raises(ConfigError, match="metric 'median' is registered twice"):

        @register("metric", "median")
        def other(ranks: Tensor, k: int | None) -> float:
            return 0.0


def test_a_wrong_metric_of_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("eval: {metrics: [mrr, hr], select: mrr}")
    with pytest.raises(ConfigError, match="'hr' needs a cut, such as hr@10"):
        load_run_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="expected name@k"):
        load_run_config(tmp_path / "a.yaml", ["eval.metrics=[mrr, ndcg@ten]"])


judged = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=25)


def pairs_won(rows: list[tuple[int, int, int]]) -> float:
    """Share of the pairs of a positive and a negative that the positive wins, ties by half; NaN without a pair."""
    pairs = [(a, b) for a, label, _ in rows if label for b, other, _ in rows if not other]
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    return won / len(pairs) if pairs else math.nan


@given(judged)
def test_metrics_of_predictions_equal_their_definitions(rows: list[tuple[int, int, int]]) -> None:
    scores, labels, groups = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = {
        name: prediction_metric(name, scores.double(), labels.double(), groups)
        for name in ("auc", "gauc", "logloss", "ne")
    }
    assert found["auc"] == pytest.approx(pairs_won(rows), rel=1e-6, nan_ok=True)
    users = [[row for row in rows if row[2] == user] for user in range(4)]
    own = [(pairs_won(each), len(each)) for each in users if not math.isnan(pairs_won(each))]
    weighted = sum(value * n for value, n in own) / sum(n for _, n in own) if own else math.nan
    assert found["gauc"] == pytest.approx(weighted, rel=1e-12, nan_ok=True)

    def cross_entropy(chance: float, label: int) -> float:
        return -math.log(chance if label else 1 - chance)

    loss = sum(cross_entropy(1 / (1 + math.exp(-score)), label) for score, label, _ in rows) / len(rows)
    assert found["logloss"] == pytest.approx(loss, rel=1e-9)
    share = sum(label for _, label, _ in rows) / len(rows)
    if 0 < share < 1:
        blind = share * cross_entropy(share, 1) + (1 - share) * cross_entropy(share, 0)
        assert found["ne"] == pytest.approx(loss / blind, rel=1e-9)
    else:
        assert math.isnan(found["ne"])


@pytest.mark.parametrize("name", ["auc", "gauc", "logloss", "ne", "mse", "mae"])
def test_scores_that_are_not_numbers_have_no_metric(name: str) -> None:
    scores, labels = torch.tensor([math.nan, 0.5, 2.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    assert math.isnan(prediction_metric(name, scores, labels, torch.zeros(3, dtype=torch.int64)))
