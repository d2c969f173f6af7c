"""The retrieval task: its loss from the negatives it draws, ranks and recommendations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from retrieval_cases import (
    CATALOGUE,
    COUNTS,
    LENGTHS,
    STRATEGIES,
    Draws,
    batch_of,
    config_of,
    drawn,
    facts,
    gradients,
    loss_of,
    recorded,
    removing,
    task_of,
)
from strategies import generator, normal, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.data.batch import JaggedBatch
from npu_rec.distributed import World
from npu_rec.errors import ConfigError
from npu_rec.ops import RowOptimizer
from npu_rec.registry import options_of
from npu_rec.tasks import Retrieval, build_task, retrieval
from npu_rec.tasks.catalogue import Catalogue

# --- the loss


@pytest.mark.parametrize(
    ("negatives", "log_q"), [*((name, False) for name in STRATEGIES), ("in_batch", True), ("popularity", True)]
)
@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
def test_the_loss_is_that_of_the_drawn_negatives(negatives: str, loss: str, log_q: bool) -> None:
    task, batch = task_of(negatives=negatives, loss=loss, log_q=log_q), batch_of()
    hidden = task.encoder.encode(batch.item_ids, batch.offsets, batch.times, batch.next_times)
    hidden, table = hidden.detach().double(), task.encoder.items.weight.detach().double()
    of_item = table / table.norm(dim=1, keepdim=True)
    total_count = sum(COUNTS[item] for item in CATALOGUE)

    def logit(token: int, item: int) -> float:
        value = float(hidden[token] @ of_item[item]) / 0.2
        share = max(COUNTS[item], 1) / total_count
        drawn_with = share if negatives == "popularity" else 1 - (1 - share) ** sum(LENGTHS)
        return value - math.log(drawn_with) if log_q else value

    expected, collisions = 0.0, 0
    for token, (positive, others) in enumerate(
        zip(batch.next_ids.tolist(), drawn(task, batch, 5).tolist(), strict=True)
    ):
        counted = [logit(token, item) for item in others if item != positive]
        collisions += len(others) - len(counted)
        own = logit(token, positive)
        if loss == "bce":
            expected += math.log1p(math.exp(-own))
            expected += sum(math.log1p(math.exp(x)) for x in counted) / max(len(counted), 1)
        else:
            expected += math.log(sum(map(math.exp, [own, *counted]))) - own
    total, weight = (x.detach() for x in loss_of(task, batch, 5))
    assert collisions > 0
    assert float(weight) == sum(LENGTHS)
    assert float(total) == pytest.approx(expected, rel=2e-5)


def test_binary_cross_entropy_of_many_tokens_gathers_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    task, batch = task_of(loss="bce"), batch_of()
    whole = loss_of(task, batch, 5)[0]
    expected = gradients(task, whole)
    monkeypatch.setattr(retrieval, "AT_ONCE", 3 * 6 * 8)  # three tokens
    parts = loss_of(task, batch, 5)[0]
    torch.testing.assert_close(parts, whole)
    found = gradients(task, parts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_epochs_and_seeds_draw_other_negatives() -> None:
    batch = batch_of()
    losses = [float(loss_of(task_of(seed=seed), batch, epoch)[0]) for seed in (3, 4) for epoch in (0, 1)]
    assert len(set(losses)) == 4
    assert float(loss_of(task_of(), batch, 1)[0]) == losses[1]


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_a_sequence_has_the_same_negatives_and_losses_in_any_batch(
    negatives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(negatives=negatives).train()  # with dropout
    with recorded(monkeypatch) as seen:
        loss_of(task, batch_of([4, 1, 6, 3], [8, 5, 2, 9]), 1)
        loss_of(task, batch_of([6, 3, 0, 2], [2, 9, 1, 4]), 1)
        loss_of(task, batch_of([1], [5]), 1)
    (draws, losses), (other_draws, other_losses), (single_draws, single_losses) = seen
    assert torch.equal(draws[5:14], other_draws[:9])
    assert torch.equal(draws[4:5], single_draws)
    torch.testing.assert_close(losses[5:14], other_losses[:9], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[4:5], single_losses, rtol=1e-5, atol=1e-6)
    assert not torch.equal(draws[:3], draws[5:8])


@pytest.mark.parametrize("negatives", STRATEGIES)
@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
@pytest.mark.parametrize("many", [True, False])
def test_leaving_unused_items_out_changes_nothing(
    negatives: str, loss: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = facts() if many else facts(num_items=500, catalogue=list(range(1, 501)), item_counts=[0, *range(500)])
    options = {"negatives": negatives, "loss": loss, "log_q": negatives != "uniform", "ssl_weight": 0.5, "ssl_items": 3}
    task, batch = task_of(about=about, **options), batch_of()
    assert (batch.tokens * 6 >= len(about.catalogue)) == many

    def everything(self: Retrieval, positives: Tensor, drawn: Draws) -> tuple[Tensor, Tensor, Draws]:
        return torch.arange(len(self.catalogue)), positives, drawn

    def only_used(self: Retrieval, positives: Tensor, drawn: Draws) -> tuple[Tensor, Tensor, Draws]:
        columns = sorted({c for x in (positives, *drawn.values()) for c in x.flatten().tolist()})
        place = {column: n for n, column in enumerate(columns)}

        def moved(x: Tensor) -> Tensor:
            return torch.tensor([place[c] for c in x.flatten().tolist()]).view(x.shape)

        return torch.tensor(columns), moved(positives), {name: moved(x) for name, x in drawn.items()}

    own = loss_of(task, batch, 2)[0]
    own_gradients = gradients(task, own)
    for other in (everything, only_used):
        monkeypatch.setattr(Retrieval, "_in_play", other)
        total = loss_of(task, batch, 2)[0]
        torch.testing.assert_close(total, own, rtol=1e-5, atol=0)
        for name, gradient in gradients(task, total).items():
            torch.testing.assert_close(gradient, own_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("negatives", STRATEGIES)
@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_batch_of_nothing_has_no_loss_and_zero_gradients(negatives: str, loss: str, lengths: list[int]) -> None:
    task = task_of(negatives=negatives, loss=loss, ssl_weight=0.5).train()
    total, weight = loss_of(task, batch_of(lengths), 0)
    assert (total.item(), weight.item()) == (0.0, 0.0)
    found = gradients(task, total)
    assert found.keys() == dict(task.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


# --- what is prepared ahead of a step


@torch.no_grad()
@pytest.mark.parametrize("negatives", STRATEGIES)
def test_a_step_can_be_prepared_before_the_weights_change(negatives: str) -> None:
    task, batch = task_of(negatives=negatives), batch_of()
    ahead = task.prepare(batch, 1)
    before = task.loss(ahead)[0]
    for parameter in task.parameters():
        parameter.mul_(1.5).add_(0.1)
    after = task.loss(ahead)[0]
    assert float(after) != float(before)
    assert float(after) == float(loss_of(task, batch, 1)[0])


@torch.no_grad()
@pytest.mark.parametrize(("many", "optimizer"), [(True, "sgd"), (True, "rowwise_adam"), (False, "sgd")])
def test_a_step_looks_up_inputs_and_candidates_and_nothing_else(many: bool, optimizer: str) -> None:
    """With many draws simply the whole catalogue, unless a row that is looked up without a gradient changes."""
    items = 30 if many else 500
    about = facts(num_items=items, catalogue=list(range(1, items + 1)), item_counts=[*COUNTS, *[0] * (items - 30)])
    task, batch = task_of(about=about, negatives="popularity"), batch_of([4, 1, 3])
    plain = loss_of(task, batch, 2)[0]
    task.encoder.items.use(RowOptimizer(optimizer, lr=0.1))  # type: ignore[arg-type]
    prepared = task.prepare(batch, 2)
    assert (batch.tokens * 6 >= len(about.catalogue)) == many
    wanted = {*batch.next_ids.tolist(), *drawn(task, batch, 2).flatten().tolist()}
    assert len(wanted) < len(about.catalogue)
    if many and optimizer == "sgd":
        wanted = set(about.catalogue.tolist())
    torch.testing.assert_close(task.loss(prepared)[0], plain, rtol=1e-5, atol=0)
    assert list(prepared.plan) == ["items"]
    ids = prepared.plan["items"].places
    assert torch.equal(ids[: batch.tokens], batch.item_ids)
    assert sorted(ids[batch.tokens :].tolist()) == sorted(wanted)  # each once
    assert torch.equal(task.catalogue.items(prepared.draws["columns"][prepared.draws["positives"]]), batch.next_ids)


def test_columns_of_the_catalogue() -> None:
    catalogue = task_of().catalogue
    assert len(catalogue) == len(CATALOGUE)
    assert catalogue.all_items(torch.device("cpu")).tolist() == CATALOGUE
    assert catalogue.items(torch.tensor([[0, 9], [3, 3]])).tolist() == [[2, 29], [7, 7]]
    assert catalogue.column(torch.tensor([[2, 29], [7, 7]])).tolist() == [[0, 9], [3, 3]]
    assert catalogue.column(torch.tensor([0, 1, 30])).tolist() == [-1, -1, -1]


@given(st.integers(1, 50), st.lists(st.integers(-3, 60), max_size=20))
def test_a_range_of_ids_is_a_catalogue_like_any_other(size: int, ids: list[int]) -> None:
    ranged, listed = Catalogue(range(1, size + 1)), Catalogue(torch.arange(1, size + 1))
    wanted = torch.tensor(ids, dtype=torch.int64)
    assert len(ranged) == len(listed) == size
    assert torch.equal(ranged.column(wanted), listed.column(wanted))
    assert torch.equal(ranged.all_items(torch.device("cpu")), listed.all_items(torch.device("cpu")))
    columns = torch.arange(size)
    assert torch.equal(ranged.items(columns), listed.items(columns))


def test_a_range_of_ids_trains_like_a_list_of_them() -> None:
    about = {"num_items": 30, "item_counts": None}
    batch, losses = batch_of(), []
    for catalogue in (range(1, 31), torch.arange(1, 31)):
        losses.append(loss_of(task_of(about=facts(**about, catalogue=catalogue)), batch, 0)[0])
    assert torch.equal(losses[0], losses[1])


def test_only_what_draws_by_popularity_counts_items() -> None:
    wanted = {("uniform", False): False, ("in_batch", True): True, ("popularity", False): True}
    for (negatives, log_q), needed in wanted.items():
        options = config_of(negatives=negatives, log_q=log_q)
        assert Retrieval.needs_item_counts(options_of(options, "task")) == needed


# --- rows of another width than the model


def test_rows_of_another_width_are_projected_in_and_out() -> None:
    config = config_of()
    config.embedding.dim = 5
    encoder = build_task(config, facts()).encoder
    assert encoder.items.weight.shape == (31, 5)
    batch = batch_of()
    hidden = encoder(batch.item_ids, batch.offsets, batch.times, batch.next_times)
    assert hidden.shape == (batch.tokens, 5)
    rows = encoder.items.weight[batch.item_ids] * 5**0.5
    plain = build_task(config_of(), facts()).encoder  # the model between the two maps
    plain.load_state_dict({n: x for n, x in encoder.state_dict().items() if "items" not in n}, strict=False)
    inputs = rows @ encoder.project_in.weight.T / plain.scale
    between = plain(batch.item_ids, batch.offsets, batch.times, batch.next_times, None, inputs)
    torch.testing.assert_close(hidden, between @ encoder.project_out.weight.T)
    n = torch.tensor([3, 4])
    assert encoder.flops(n) == plain.flops(n) + 2 * 2 * 5 * 8 * 7


# --- data without times


def test_a_time_bias_on_data_without_times_is_refused_with_what_to_set() -> None:
    expected = r"data\.name: ml-100k has no times, .* set model\.options\.bias to position"
    for options in ({}, {"bias": "position_time"}, {"variant": "production", "bias": "position_time"}):
        with pytest.raises(ConfigError, match=expected):
            task_of({"options": options}, facts(has_times=False))


@pytest.mark.parametrize("options", [{"bias": "position"}, {"bias": "none"}, {"variant": "production"}])
def test_data_without_times_trains_and_ranks_without_a_time_bias(options: dict[str, str]) -> None:
    task, batch = task_of({"options": options}, facts(has_times=False)), batch_of(times=False)
    total, _ = loss_of(task, batch, 0)
    assert total.isfinite()
    assert task.ranks(batch).shape == (4,)


# --- ranks and recommendations


def similarities(task: Retrieval, batch: JaggedBatch) -> list[dict[int, float]]:
    """Of each sequence: item of the catalogue -> cosine."""
    vectors = task.encoder.encode(batch.item_ids, batch.offsets, batch.times, batch.next_times)
    table = task.encoder.items.weight
    users = [vectors[end - 1] if end > start else vectors.new_zeros(8) for start, end in batch.offsets.unfold(0, 2, 1)]
    return [{item: float(user @ table[item] / table[item].norm()) for item in CATALOGUE} for user in users]


REMOVED: list[list[int]] = [[2, 3, 30], [], [5, 5, 7, 1], [29]]  # 30 and 1 are not in the catalogue


@torch.no_grad()
def test_ranks_are_those_of_sorting_what_is_left() -> None:
    task, batch = task_of(), removing(batch_of(), *REMOVED)
    targets = batch.next_ids[batch.offsets[1:] - 1].tolist()
    expected = []
    for scores, removed, target in zip(similarities(task, batch), REMOVED, targets, strict=True):
        left = [item for item in CATALOGUE if item not in removed or item == target]
        expected.append(sorted(left, key=lambda item, scores=scores: -scores[item]).index(target) + 1)
    assert task.ranks(batch).tolist() == expected


@torch.no_grad()
def test_a_target_that_is_in_the_history_stays_in_the_ranking() -> None:
    task, batch = task_of(), batch_of()
    targets = batch.next_ids[batch.offsets[1:] - 1].tolist()
    assert task.ranks(removing(batch, *([item] for item in targets))).tolist() == task.ranks(batch).tolist()
    assert task.ranks(removing(batch, *[CATALOGUE] * 4)).tolist() == [1, 1, 1, 1]


@torch.no_grad()
def test_metrics_are_over_all_batches() -> None:
    task, whole = task_of(), batch_of()
    parts = [batch_of(LENGTHS[:1]), batch_of(LENGTHS[1:], [101, 102, 103])]
    metrics = ["hr@3", "ndcg@10", "mrr"]
    observed = torch.cat([task.observe(part) for part in parts])
    assert task.metrics(observed, metrics) == task.metrics(task.observe(whole), metrics)
    assert task.metrics(task.observe(whole), ["mrr"])["mrr"] == pytest.approx(float((1 / task.ranks(whole)).mean()))
    assert task.metrics(task.observe(batch_of([])), metrics) == dict.fromkeys(metrics, 0.0)


@torch.no_grad()
def test_likelihoods_are_of_the_held_out_items_over_the_temperature() -> None:
    task, batch = task_of(temperature=0.1), removing(batch_of(), *[CATALOGUE] * 4)  # which take nothing out
    targets = batch.next_ids[batch.offsets[1:] - 1].tolist()
    for found, cosines, target in zip(
        task.log_likelihood(batch).tolist(), similarities(task, batch), targets, strict=True
    ):
        total = sum(math.exp(cosines[item] / 0.1) for item in CATALOGUE)
        assert found == pytest.approx(cosines[target] / 0.1 - math.log(total), rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_ranks_after_training_are_those_of_the_new_rows() -> None:
    """In evaluation the catalogue's vectors are read once."""
    batch = batch_of()
    task, other = task_of(), task_of()
    other.encoder.items.weight.copy_(normal(generator(9), 31, 8, scale=0.5))
    before, expected = task.top_k(batch, 10)[1], other.top_k(batch, 10)[1]
    assert not torch.equal(before, expected)
    task.train()
    task.encoder.items.weight.copy_(other.encoder.items.weight)
    assert torch.equal(task.eval().top_k(batch, 10)[1], expected)
    assert torch.equal(task.top_k(batch, 10)[1], expected)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4, 10, 13])
def test_recommendations_are_the_best_items_left_then_zeros(k: int) -> None:
    task, batch = task_of(), removing(batch_of([4, 0, 6, 3]), [2, 3, 30], [], CATALOGUE, CATALOGUE[1:])
    ids, scores = task.top_k(batch, k)
    assert ids.shape == scores.shape == (4, k)
    removed = [[2, 3], [], CATALOGUE, CATALOGUE[1:]]
    for row, (cosines, gone) in enumerate(zip(similarities(task, batch), removed, strict=True)):
        left = sorted((item for item in CATALOGUE if item not in gone), key=lambda item, c=cosines: -c[item])[:k]
        if row != 1:  # without a history all scores are alike
            assert ids[row].tolist() == left + [0] * (k - len(left))
        assert set(ids[row].tolist()) <= {0, *CATALOGUE} - set(gone)
        expected = [cosines[item] for item in left] + [-math.inf] * (k - len(left))
        torch.testing.assert_close(scores[row], torch.tensor(expected), rtol=1e-5, atol=1e-6)


# --- building


def test_a_task_is_made_from_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_task(config_of(), facts()).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = (build_task(config_of(seed=seed), facts()).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.items.weight"], other["encoder.items.weight"])
    assert not torch.equal(first["encoder.positions"], other["encoder.positions"])
    assert set(first) == {name for name, _ in task_of().named_parameters()}  # nothing of the data set


def test_more_items_start_with_the_same_rows() -> None:
    few = build_task(config_of(), facts()).state_dict()["encoder.items.weight"]
    many = build_task(config_of(), facts(num_items=60)).state_dict()["encoder.items.weight"]
    assert torch.equal(many[:31], few)


def test_recomputation_is_switched_on_by_the_configuration() -> None:
    config = config_of()
    assert build_task(config, facts()).encoder.backbone.recompute is False
    config.train.recompute = True
    assert build_task(config, facts()).encoder.backbone.recompute is True


# --- backbones


@pytest.mark.parametrize("options", [{"backbone": "llama"}, {"options": {"scores": "softmax"}}])
def test_backbones_that_cannot_share_sequences_say_so(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "context_world", lambda *_: World(0, 2))
    with pytest.raises(ConfigError, match=r"parallel.context: model.backbone \w+ cannot share sequences"):
        build_task(config_of({"attention_dim": 4} | options), facts())


@pytest.mark.parametrize("backbone", ["llama", "gpt", "sasrec"])
def test_every_backbone_learns_from_a_batch(backbone: str) -> None:
    task = build_task(config_of({"backbone": backbone, "attention_dim": 4}), facts()).train()
    optimizer = torch.optim.Adam(task.parameters(), 0.01)
    losses = []
    for epoch in range(30):
        total, weight = task.loss(task.prepare(batch_of(), epoch))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append(float(total.detach() / weight))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(p.grad is not None for p in task.parameters())
