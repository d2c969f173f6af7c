"""Negatives of the retrieval task, and its contrast of items."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from retrieval_cases import (
    CATALOGUE,
    COUNTS,
    STRATEGIES,
    batch_of,
    drawn,
    facts,
    gradients,
    loss_of,
    recorded,
    task_of,
)
from strategies import one_thread  # noqa: F401
from torch import Tensor

from npu_rec.data.batch import JaggedBatch
from npu_rec.errors import ConfigError
from npu_rec.ops.jagged import position_of_token, sequence_of_token
from npu_rec.ops.random import derive_keys, dropout_scale, random_integers, random_key
from npu_rec.tasks import Retrieval
from npu_rec.tasks.negatives import NegativeSampler


def frequencies(sampler: NegativeSampler, in_batch: list[int]) -> Tensor:
    keys = random_key(0, "negatives", torch.arange(2000))
    columns = sampler.draw(keys, 50, torch.tensor(in_batch))
    assert columns.shape == (2000, 50)
    assert columns.dtype == torch.int64
    return torch.bincount(columns.flatten(), minlength=sampler.size) / columns.numel()


@pytest.mark.parametrize(
    ("strategy", "in_batch", "expected"),
    [
        ("uniform", [1], [1, 1, 1, 1, 1]),
        ("popularity", [1], [4, 0, 1, 0, 5]),
        ("in_batch", [3, 1, 3, 3, 3, 1, 4], [0, 1, 0, 1, 1]),  # each distinct item alike
    ],
)
def test_negatives_are_distributed_as_said(strategy: Any, in_batch: list[int], expected: list[int]) -> None:
    found = frequencies(NegativeSampler(strategy, 5, torch.tensor([4, 0, 1, 0, 5])), in_batch)
    wanted = torch.tensor(expected) / sum(expected)
    assert not found[wanted == 0].any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.008)  # five deviations of 100,000 draws


def test_popularity_survives_more_events_than_a_draw_has_values() -> None:
    counts = torch.tensor([3 * 2**31, 0, 1, 2**31])
    found = frequencies(NegativeSampler("popularity", 4, counts), [])
    torch.testing.assert_close(found, torch.tensor([0.75, 0, 0, 0.25]), rtol=0, atol=0.008)
    rare = NegativeSampler("popularity", 4, counts).cumulative.diff().tolist()[:2]
    assert rare == [0, 1]  # the rare item can be drawn


def test_negatives_stay_in_a_catalogue_smaller_than_the_id_range(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([5, 3])
    for strategy in STRATEGIES:
        task = task_of(negatives=strategy, num_negatives=400)
        items = set(drawn(task, batch, 0).flatten().tolist())
        popular = {item for item in CATALOGUE if COUNTS[item]}
        of_batch = set(batch.next_ids.tolist())
        assert items == {"uniform": set(CATALOGUE), "popularity": popular, "in_batch": of_batch}[strategy]
    with recorded(monkeypatch) as seen:  # and these are what the loss uses
        loss_of(task, batch, 0)
    assert torch.equal(task.catalogue.items(seen[0][0]), drawn(task, batch, 0))


def test_log_q_is_the_share_of_training_events() -> None:
    sampler = NegativeSampler("popularity", 5, torch.tensor([4, 0, 1, 0, 5]))
    torch.testing.assert_close(sampler.log_q().exp()[[0, 2, 4]], torch.tensor([0.4, 0.1, 0.5]))
    assert sampler.log_q().isfinite().all()


def test_in_batch_is_corrected_by_the_chance_to_be_in_the_batch() -> None:
    """Frequent items are in nearly every batch, whose distinct items are drawn alike."""
    share = torch.tensor([0.4, 0.1, 0.001])
    sampler = NegativeSampler("in_batch", 3)
    found = sampler.correction(share.log(), 50)
    torch.testing.assert_close(found.exp(), 1 - (1 - share.double()).pow(50).float(), rtol=1e-5, atol=0)
    assert torch.equal(NegativeSampler("popularity", 3, torch.ones(3)).correction(share.log(), 50), share.log())


def test_draws_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.options\.log_q: uniform negatives need no correction"):
        task_of(log_q=True)
    with pytest.raises(ConfigError, match=r"task\.options\.negatives: popularity needs training events"):
        task_of(about=facts(item_counts=[0] * 31), negatives="popularity")


# --- the contrast of items


def contrast(task: Retrieval, table: Tensor, batch: JaggedBatch, epoch: int) -> Tensor:
    """`[T]` of the formula in float64, from rows `[num_items + 1, E]`."""
    options = task.options
    sequences = batch.sequence_ids[sequence_of_token(batch.offsets, batch.tokens)]
    keys = random_key(3, "contrast", epoch, sequences, position_of_token(batch.offsets, batch.tokens))
    drawn = task.catalogue.items(random_integers(keys, options.ssl_items, len(task.catalogue)))
    of_items = random_key(3, "views", epoch, torch.arange(table.shape[0]))
    views = []
    for view in (0, 1):
        kept = dropout_scale(derive_keys(of_items, view), table.shape[1], options.ssl_dropout).double()
        views.append(torch.nn.functional.normalize(table * kept, dim=1))
    losses = []
    for items in drawn.tolist():
        cosines = torch.stack([views[0][items[0]] @ views[1][j] for j in (items[0], *items[1:]) if j != items[0]])
        own = views[0][items[0]] @ views[1][items[0]]
        losses.append(torch.logsumexp(torch.cat([own[None], cosines]) / options.ssl_temperature, 0))
        losses[-1] = losses[-1] - own / options.ssl_temperature
    return torch.stack(losses)


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_contrast_is_added_with_its_weight(loss: str, dropout: float) -> None:
    plain = task_of(loss=loss)
    task = task_of(loss=loss, ssl_weight=0.7, ssl_items=5, ssl_dropout=dropout, ssl_temperature=0.3)
    batch, table = batch_of(), plain.encoder.items.weight.detach().double().requires_grad_()
    expected = contrast(task, table, batch, 4).sum()
    expected.backward()
    (total, weight), (without, tokens) = loss_of(task, batch, 4), loss_of(plain, batch, 4)
    assert weight == tokens
    assert float((total - without).detach()) == pytest.approx(0.7 * float(expected.detach()), rel=1e-4)
    found = gradients(task, total)["encoder.items.weight"] - gradients(plain, without)["encoder.items.weight"]
    torch.testing.assert_close(found.double(), 0.7 * table.grad, rtol=1e-4, atol=1e-5)


def contrast_of(task: Retrieval, batch: JaggedBatch, epoch: int) -> Tensor:
    """`[T]` of the task."""
    assert task.contrast is not None
    prepared = task.prepare(batch, epoch)
    items = task.catalogue.items(prepared.draws["columns"])
    return task.contrast.loss(epoch, items, task.encoder.items(items), prepared.draws["contrast"])


@torch.no_grad()
def test_the_contrast_of_a_sequence_depends_on_nothing_beside_it() -> None:
    task = task_of(ssl_weight=1.0, ssl_items=4)
    together = contrast_of(task, batch_of([4, 1, 6, 3], [8, 5, 2, 9]), 1)
    assert together.unique().shape[0] > 10
    torch.testing.assert_close(contrast_of(task, batch_of([6, 3], [2, 9]), 1), together[5:14], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(contrast_of(task, batch_of([1], [5]), 1), together[4:5], rtol=1e-5, atol=1e-6)


def test_the_contrast_without_dropout_spreads_rows_out() -> None:
    task = task_of(ssl_weight=1.0, ssl_items=8, ssl_dropout=0.0)
    table = task.encoder.items.weight
    optimizer = torch.optim.Adam([table], 0.02)

    def closest() -> float:
        rows = torch.nn.functional.normalize(table.detach()[CATALOGUE], dim=1)
        return float((rows @ rows.T).fill_diagonal_(-1.0).max())

    before = closest()
    for epoch in range(40):
        optimizer.zero_grad()
        contrast_of(task, batch_of(), epoch).sum().backward()
        optimizer.step()
    assert closest() < before - 0.2
