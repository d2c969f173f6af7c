"""Tables on 2, 3 and 4 ranks: rows and training of one process, whatever the placement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from embedding_ranks import CASES, COLLECTIVES, REPLICATED, SPECS, STEPS, Case, Results, rank_process, run_alone
from gloo_ranks import on_ranks
from strategies import one_thread  # noqa: F401
from torch import Tensor

Ranks = list[dict[str, Results]]


def run_ranks(folder: Path, count: int) -> Ranks:
    """`rank_process` in `count` gloo processes; what each left."""
    on_ranks(count, rank_process, count, folder / "store")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    """What each of so many ranks left; they run once."""
    done: dict[int, Ranks] = {}

    def get(count: int) -> Ranks:
        if count not in done:
            done[count] = []
            done[count] = run_ranks(tmp_path_factory.mktemp(f"ranks-{count}"), count)
        assert done[count], "the ranks failed in a test before this one"
        return done[count]

    return get


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Results]:
    done: dict[Case, Results] = {}

    def get(case: Case) -> Results:
        if case not in done:
            done[case] = run_alone(case, tmp_path_factory.mktemp("alone"))
        return done[case]

    return get


def assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-12 if expected.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check(ranks: Ranks, name: str, case: Case, expected: Results) -> None:
    """The ranks read, learnt and kept what one process did."""
    group = ranks[: len(ranks) // case.replicas]  # which together hold every row once
    for spec in SPECS[: case.tables]:
        looked = [rank[name][f"looked.{spec.name}"] for rank in ranks]
        assert_close(torch.stack(looked).sum(0), expected[f"looked.{spec.name}"])
        for rank in ranks:
            assert_close(rank[name][f"read.{spec.name}"], expected[f"read.{spec.name}"])
            if case.optimizer != "dense":  # by which Adam corrects
                assert rank[name][f"own.{spec.name}.step"] == expected[f"own.{spec.name}.step"] == STEPS
        if case.kind == "dynamic" and case.tier == "device":
            for count in ("rows", "waiting", "refused", "expired"):
                key = f"own.{spec.name}.count of {count}"
                assert sum(float(rank[name][key]) for rank in group) == float(expected[key]), key
    if case.tier != "device":
        assert sum(float(rank[name]["own.items.count of evicted"]) for rank in ranks) > 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_learn_what_one_process_learns(
    count: int, name: str, ranks_of: Callable[[int], Ranks], alone: Callable[[Case], Results]
) -> None:
    check(ranks_of(count), name, CASES[name], alone(CASES[name]))


@pytest.mark.parametrize("name", REPLICATED)
@pytest.mark.parametrize("count", [2, 4])
def test_groups_of_ranks_learn_what_one_process_learns_and_stay_alike(
    count: int, name: str, ranks_of: Callable[[int], Ranks], alone: Callable[[Case], Results]
) -> None:
    ranks, case = ranks_of(count), REPLICATED[name]
    check(ranks, name, case, alone(case))
    for one, other in zip(ranks[: count // 2], ranks[count // 2 :], strict=True):
        kept = [key for key in one[name] if key.startswith("own.")]
        assert len(kept) >= case.tables
        assert all(torch.equal(one[name][key], other[name][key]) for key in kept)


def test_training_changes_the_rows(alone: Callable[[Case], Results]) -> None:
    for case in CASES.values():
        rows = alone(case)
        for spec in SPECS[: case.tables]:
            first = spec.initial_rows(case.keys(spec)).to(case.dtype)
            assert float((rows[f"read.{spec.name}"] - first).abs().max()) > 0.01


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_step_takes_four_messages_however_many_tables(count: int, ranks_of: Callable[[int], Ranks]) -> None:
    for name in ("row_wise, sgd", "table_wise, sgd", "row_wise, rowwise_adam", "dynamic, rowwise_adagrad", "one table"):
        for rank in ranks_of(count):  # how many ids, ids, rows, gradients
            calls = dict(zip(COLLECTIVES, rank[name]["collectives"].tolist(), strict=True))
            assert calls == {**dict.fromkeys(COLLECTIVES, 0), "all_to_all_single": 4 * STEPS}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rows_are_divided_over_the_ranks(count: int, ranks_of: Callable[[int], Ranks]) -> None:
    ranks = ranks_of(count)
    for name, axis in (("row_wise, sgd", 0), ("column_wise, sgd", 1)):
        for spec in SPECS:
            shape = [spec.num_rows, spec.dim]
            sizes = [len(part) for part in torch.empty(int(shape[axis] or 0)).chunk(count)]
            found = [rank[name][f"own.{spec.name}.weight"].shape for rank in ranks]
            assert [x[axis] for x in found] == sizes + [0] * (count - len(sizes))
            assert {x[1 - axis] for x in found} == {shape[1 - axis]}
    held = [[len(rank["table_wise, sgd"][f"own.{spec.name}.weight"]) for spec in SPECS] for rank in ranks]
    assert torch.tensor(held).sum(0).tolist() == [50, 7, 2]
    assert sum(any(row) for row in held) == min(count, 3)
    keys = [rank["dynamic, sgd"]["own.items.ids"] for rank in ranks]
    assert all(len(x) for x in keys)
    assert len(torch.cat(keys).unique()) == sum(map(len, keys)) <= 50


def test_wrong_groups_and_wrong_ids_are_errors(ranks_of: Callable[[int], Ranks]) -> None:
    assert all(bool(rank["refusals"]["refused"].all()) for rank in ranks_of(2))
