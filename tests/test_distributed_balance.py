"""Sequences spread over ranks by their cost: about equal work, the same global batch, the same numbers."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from retrieval_cases import batch_of, config_of, facts, gradients, task_of
from strategies import examples, one_thread  # noqa: F401
from test_data_recipes import store_of
from test_data_splits import random_split, rows_of

from npu_rec.bench.balance import of_lengths
from npu_rec.data.loader import Share, TrainLoader, in_order
from npu_rec.data.splits import LeaveOneOut, Split, leave_one_out
from npu_rec.device import get_device
from npu_rec.distributed.balance import SequenceCost, assign, imbalance
from npu_rec.tasks import build_task

HSTU = SequenceCost(linear=62_900, attention=400)  # two layers of 50 and 128 negatives, as configs/ml-1m/hstu.yaml

# --- the estimate


def test_the_cost_counts_tokens_and_causal_pairs() -> None:
    cost = SequenceCost(linear=7.0, attention=3.0)
    counted = [7.0 * n + 3.0 * sum(j <= i for i in range(n) for j in range(n)) for n in (0, 1, 2, 5, 30)]
    assert cost(np.array([0, 1, 2, 5, 30])).tolist() == counted
    assert cost(np.array([1], np.int32)).dtype == np.float64
    assert cost(np.array([2**31])).item() == 7.0 * 2**31 + 3.0 * 2**30 * (2**31 + 1)


@pytest.mark.parametrize("variant", ["research", "production"])
def test_the_coefficients_are_those_of_the_model(variant: str) -> None:
    task = build_task(config_of({"num_blocks": 3, "options": {"variant": variant}}), facts())
    cost = SequenceCost.from_flops(task.flops)
    assert cost.linear > 0
    assert cost.attention == 2 * 3 * 2 * (3 + 4)  # a multiplication and an addition, layers, heads, dims of qk and v
    lengths = torch.tensor([1, 2, 3, 17, 200, 8192])
    assert cost(lengths.numpy()).sum() == pytest.approx(task.flops(lengths), rel=1e-12)


# --- the assignment

costs_of = st.lists(st.integers(0, 50), max_size=40).map(lambda values: np.array(values, np.float64))


@given(costs_of, st.integers(1, 9))
@examples(150)
def test_every_sequence_goes_to_one_rank_the_costliest_first(costs: np.ndarray, ranks: int) -> None:
    shares = assign(costs, ranks)
    assert len(shares) == ranks
    assert {share.dtype for share in shares} == {np.dtype(np.int64)}
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(costs)))
    for share in shares:
        keys = [(-costs[index], index) for index in share.tolist()]
        assert keys == sorted(keys)
    work = [float(costs[share].sum()) for share in shares]
    for own, share in zip(work, shares, strict=True):  # it had the least when it took its last one
        assert len(share) == 0 or own - costs[share[-1]] <= min(work)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
@examples(60)
def test_the_largest_share_is_within_a_third_of_the_best_possible(values: list[int], ranks: int) -> None:
    costs = np.array(values, np.float64)
    best = min(
        max(sum(c for c, r in zip(values, places, strict=True) if r == rank) for rank in range(ranks))
        for places in product(range(ranks), repeat=len(values))
    )
    assert max(costs[share].sum() for share in assign(costs, ranks)) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_ties_go_by_index_and_rank() -> None:
    assert [share.tolist() for share in assign(np.ones(7), 3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [share.tolist() for share in assign(np.array([1.0, 5.0]), 4)] == [[1], [0], [], []]
    assert [share.tolist() for share in assign(np.zeros(0), 2)] == [[], []]


def test_imbalance_is_the_largest_over_the_mean() -> None:
    assert imbalance([1.0, 2.0, 3.0]) == 1.5
    assert imbalance([4.0]) == 1.0
    assert imbalance([0.0, 0.0]) == 1.0


# --- batches of real lengths


def split_of(lengths: np.ndarray) -> Split:
    """A split of which nothing but the lengths is read."""
    starts = np.zeros_like(lengths)
    return LeaveOneOut(None, np.arange(len(lengths)), starts, lengths + 1, "train")  # type: ignore[arg-type]


def estimates(split: Split, share: Share, ranks: int = 8) -> list[float]:
    """Largest over mean estimated cost of each full global batch of 1,024 sequences in an epoch."""
    loader = TrainLoader(split, batch_size=1024, batch_tokens=None, seed=2, world=ranks, share=share)
    batches = [rows for rows in loader.batches(0) if len(rows) == 1024]
    return [
        imbalance([float(HSTU(split.lengths[own]).sum()) for own in loader.shares(rows, split.lengths)])
        for rows in batches
    ]


def check_balance(whole: Split, windows: Split) -> None:
    """Of whole histories, dealing in order gives about 1.3; of the last 200 events, less. Balanced, neither matters."""
    assert len(estimates(whole, in_order)) >= 5
    assert np.mean(estimates(whole, in_order)) == pytest.approx(1.3, abs=0.1)
    assert np.mean(estimates(windows, in_order)) > 1.05
    assert max(estimates(whole, HSTU.share)) < 1.01
    assert max(estimates(windows, HSTU.share)) < 1.001


def test_log_normal_lengths_are_balanced() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(96), 1.05, 6040).astype(np.int64).clip(18, 2300)
    check_balance(split_of(lengths), split_of(lengths.clip(max=200)))


def test_ml_1m_is_balanced(tmp_path: Path) -> None:
    if "NPU_REC_DATA" not in os.environ:
        pytest.skip("NPU_REC_DATA is not set: no real data to read")
    store = store_of("ml-1m", Path(os.environ["NPU_REC_DATA"]) / "ml-1m", tmp_path)
    check_balance(*(leave_one_out(store, "meta", longest)["train"] for longest in (4096, 200)))


# --- the loader


def loader_of(rank: int = 0, world: int = 1, batch_tokens: int | None = None) -> TrainLoader:
    lengths = np.random.default_rng(1).geometric(0.08, 50) + 3
    split = random_split(lengths.tolist(), max_seq_len=40)
    return TrainLoader(
        split, batch_size=16, batch_tokens=batch_tokens, seed=5, rank=rank, world=world, share=HSTU.share
    )


@pytest.mark.parametrize("batch_tokens", [None, 150])
@pytest.mark.parametrize("world", [2, 3, 8, 20])
def test_balanced_ranks_share_the_global_batch_of_one(world: int, batch_tokens: int | None) -> None:
    alone = list(loader_of(batch_tokens=batch_tokens).epoch(1))
    ranks = [list(loader_of(rank, world, batch_tokens).epoch(1)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    longest_first = False
    for step, whole in enumerate(alone):
        together: dict[int, dict[str, list[int]]] = {}
        for batch in (batches[step] for batches in ranks):
            assert not together.keys() & set(batch.sequence_ids.tolist())
            together |= rows_of(batch)
            lengths = batch.offsets.diff()
            assert (lengths.diff() <= 0).all()
            longest_first |= len(lengths.unique()) > 1
        assert together == rows_of(whole)
        assert batch_tokens is None or whole.tokens <= batch_tokens
    assert longest_first or world == 20


def test_one_process_keeps_the_order_of_training() -> None:
    loader = loader_of()
    rows = loader.batches(0)[0]
    assert [own.tolist() for own in loader.shares(rows, loader.lengths(0))] == [rows.tolist()]
    assert (np.diff(loader.split.lengths[rows]) > 0).any()


# --- the numbers

LENGTHS = [7, 1, 24, 3, 3, 16, 40, 2, 11, 5, 1, 30]


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
def test_losses_and_gradients_do_not_depend_on_the_layout(loss: str) -> None:
    """Dropout and negatives are keyed by sequence, so a batch permuted, or cut into shares, loses the same."""
    model = {"max_seq_len": 40, "dropout": 0.3, "input_dropout": 0.3, "num_blocks": 2}
    task = task_of(model, loss=loss).train()
    lengths, ids = np.array(LENGTHS), np.arange(100, 100 + len(LENGTHS))

    def learn(layout: list[np.ndarray], epoch: int) -> tuple[float, dict[str, torch.Tensor]]:
        batches = [batch_of(lengths[own].tolist(), ids[own].tolist()) for own in layout]
        losses = [task.loss(task.prepare(batch, epoch))[0] for batch in batches]
        total = torch.stack(losses).sum()
        return total.item(), gradients(task, total)

    whole = learn([np.arange(len(LENGTHS))], 1)
    permuted = [np.random.default_rng(0).permutation(len(LENGTHS))]
    for layout in (permuted, *(HSTU.share(lengths, ranks) for ranks in (1, 2, 5, 16))):
        total, slopes = learn(layout, 1)
        assert total == pytest.approx(whole[0], rel=1e-6)
        assert slopes.keys() == whole[1].keys()
        torch.testing.assert_close(slopes, whole[1], rtol=1e-4, atol=1e-5)
    assert learn(permuted, 2)[0] != pytest.approx(whole[0], rel=1e-3)  # other draws would show


def test_the_bench_sets_the_slowest_rank_beside_the_mean() -> None:
    rows = of_lengths(torch.tensor(LENGTHS), 40, get_device("cpu"), repeats=1)
    assert [row.backend for row in rows] == ["order", "order", "cost", "cost"]
    costs = HSTU(np.array(LENGTHS))
    for (slowest, average), share in zip((rows[:2], rows[2:]), (in_order, HSTU.share), strict=True):
        estimate = imbalance([float(costs[own].sum()) for own in share(np.array(LENGTHS), 8)])
        measured = slowest.total_ms / average.total_ms
        assert slowest.shape == f"B=12 N=40 slowest rank, {measured:.2f} of the mean, {estimate:.2f} estimated"
        assert average.shape == "B=12 N=40 mean of 8 ranks"
        assert 1 <= measured <= 8
        assert slowest.speedup == pytest.approx(rows[0].total_ms / slowest.total_ms)
