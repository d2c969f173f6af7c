"""Plans and simulated ranks: what they count, what they advise, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from conftest import npu_rec, npu_rec_json

from npu_rec.config import Config
from npu_rec.distributed.mirror import Message, close_mirror, open_mirror
from npu_rec.errors import ConfigError
from npu_rec.planning import Machines, facts_of, machines_of, make_plan, simulate_rank
from npu_rec.planning.changes import changed
from npu_rec.planning.simulate import Rank, simulate
from npu_rec.planning.size import Load, load_of
from npu_rec.train import load_run_config

pytestmark = pytest.mark.usefixtures("no_process_group")

GIB = 2**30
SPARSE = {"embedding.optimizer": "rowwise_adagrad"}


def small(**settings: Any) -> Config:
    """A model of some thousand items, and settings whose dots are written as two underscores."""
    base = load_run_config("configs/quickstart.yaml", ["data.name=synthetic", "train.batch_size=32"])
    given = {"model.max_seq_len": 32, "task.options": {"num_negatives": 8}}
    return changed(base, given | {name.replace("__", "."): value for name, value in settings.items()})


def rank_of(config: Config, ranks: int, rank: int = 0, sequences: int | None = None) -> Rank:
    load = load_of(config, ranks, None)
    if sequences is not None:
        load = Load(sequences, load.length, float(sequences), 1)
    return simulate(config, facts_of(config), load, rank=rank, ranks=ranks, ranks_per_node=4)


# --- the mirror


@pytest.fixture
def recorded() -> Iterator[list[Message]]:
    messages: list[Message] = []
    yield messages
    close_mirror()


def test_a_mirror_counts_what_a_rank_sends(recorded: list[Message]) -> None:
    world = open_mirror(5, 8, 4, recorded.append, lambda x: True)  # two nodes of four
    sent = torch.arange(36, dtype=torch.float32).view(36, 1)
    received = world.all_to_all(sent, list(range(1, 9)), [6] * 8, "x")
    assert torch.equal(received, sent[15:21].repeat(8, 1))  # what it sends to itself, from everybody
    near, far = 4 * (5 + 7 + 8), 4 * (1 + 2 + 3 + 4)
    assert (recorded[0].within_node, recorded[0].between_nodes) == (near, far)
    world.all_reduce(torch.zeros(100), "y")
    # hierarchical: 3/4 of the whole within a node, half of a quarter between two nodes; and all that once more back
    assert (recorded[1].within_node, recorded[1].between_nodes) == (2 * 400 * 3 / 4, 2 * 100 / 2)
    assert world.all_to_all(sent, [36, *[0] * 7], [1, 2, *[0] * 6], "z").shape == (3, 1)


def test_a_mirror_divides_like_a_world(recorded: list[Message]) -> None:
    world = open_mirror(5, 8, 4, recorded.append, lambda x: True)
    part = world.split([[0, 2, 4, 6], [1, 3, 5, 7]])
    assert (part.rank, part.size) == (2, 4)
    part.all_to_all(torch.zeros(4, 1), [1, 1, 1, 1], [1, 1, 1, 1], "x")
    assert (recorded[0].ranks, recorded[0].within_node, recorded[0].between_nodes) == (4, 4.0, 8.0)
    assert part.all_gather("a", "x") == ["a"] * 4


# --- one rank


def test_a_trillion_parameters_are_planned_in_less_than_a_minute() -> None:
    start = perf_counter()
    document = npu_rec_json("plan", "configs/scale/trillion.yaml", "--cards", 1024, "--memory", "64GiB")
    assert perf_counter() - start < 60
    rows, layer = 8 * 10**9, 1024 * 8 * 4 * 128 + 1024 * 1024 + 1024  # projection, output and its bias
    bias = 2 * (8192 + 11) - 1 + 129
    dense = 24 * (layer + bias) + (8192 + 11) * 1024 + 2 * 128 * 1024
    assert document["parameters"] == rows * 128 + dense > 10**12
    assert document["tables"][0]["bytes_per_card_max"] == rows // 1024 * (128 + 1) * 4
    assert document["cards"] == 1024
    assert document["fits"] is True
    assert document["bytes_per_card_max"] < 64 * GIB
    sent = {movement["what"]: movement for movement in document["movements"]}
    gradients = sent["gradients"]["bytes_within_node"] + sent["gradients"]["bytes_between_nodes"]
    assert gradients == pytest.approx(2 * 4 * dense * (7 / 8 + 127 / 128 / 8), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, 1),
        ({}, 4),
        (SPARSE | {"embedding.placement": "column_wise"}, 4),
        (SPARSE | {"embedding.placement": "table_wise", "parallel.dense": "fsdp", "train.recompute": True}, 4),
        (SPARSE | {"embedding.replicas": 2, "train.precision": "bf16"}, 8),
        ({"parallel.context": 2, "train.clip_norm": 1.0}, 4),
        ({"embedding.placement": "replicated", "parallel.reduce": "bf16", "train.accumulate": 2}, 4),
        ({"task.options": {"negatives": "popularity", "log_q": True, "loss": "bce", "num_negatives": 4}}, 2),
    ],
)
def test_every_kind_of_parallelism_is_simulated(settings: dict[str, Any], ranks: int) -> None:
    config = small(**{name.replace(".", "__"): value for name, value in settings.items()})
    for rank in {0, ranks - 1}:
        found = rank_of(config, ranks, rank)
        held = sum(4 * table.held[rank] for table in found.tables)
        assert found.memory.tables == held
        whole = sum(found.tables[0].held) / (ranks if config.embedding.placement == "replicated" else 1)
        assert whole / max(1, config.embedding.replicas if ranks > 1 else 1) == found.tables[0].parameters
        assert found.memory.peak > found.memory.tables + found.memory.activations
        assert bool(found.messages) == (ranks > 1)


def test_dynamic_tables_count_a_row_for_every_item_up_to_their_limit() -> None:
    items, record = 20_001, 64 + 1
    found = rank_of(small(**_double(SPARSE | {"embedding.kind": "dynamic"})), 4)
    assert found.tables[0].bytes_of(0) == 4 * record * -(-items // 4)
    tier = {"embedding.tier": "host", "embedding.rows": 4_000, "embedding.eviction": "lru"}
    found = rank_of(small(**_double(SPARSE | tier)), 4)
    assert found.tables[0].bytes_of(0) == found.memory.tables + found.memory.table_states == 4 * record * 4_000
    assert found.tables[0].bytes_below(0) == 4 * record * (-(-items // 4) - 4_000)


def test_a_step_that_reads_more_rows_than_there_are_slots_is_refused() -> None:
    config = small(
        **_double(SPARSE | {"embedding.kind": "dynamic", "embedding.rows": 600, "embedding.eviction": "lru"})
    )
    with pytest.raises(ConfigError, match=r"table items: .* embedding\.rows; raise it, or make batches smaller"):
        simulate_rank(config, 0, 4)


def test_more_tokens_than_are_simulated_lie_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    whole = rank_of(config, 2, sequences=64)
    monkeypatch.setattr("npu_rec.planning.simulate.TOKENS", 32 * 32)
    continued = rank_of(config, 2, sequences=64)
    assert continued.tokens == whole.tokens
    assert continued.flops == pytest.approx(whole.flops)
    for name, size in vars(whole.memory).items():
        assert getattr(continued.memory, name) == pytest.approx(size, rel=0.1), name


def test_longer_histories_and_half_the_cards_cost_more() -> None:
    config = small()
    short, long = (load_of(config, 4, n) for n in (8, None))
    sizes = [simulate(config, facts_of(config), x, rank=0, ranks=4, ranks_per_node=4).memory for x in (short, long)]
    assert sizes[1].activations > 3 * sizes[0].activations
    assert sizes[1].tables == sizes[0].tables


def _double(settings: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".", "__"): value for name, value in settings.items()}


# --- plans


def test_what_makes_it_fit_is_found_by_planning_it() -> None:
    config = small(**_double(SPARSE), model__embedding_dim=256, model__num_blocks=4)
    facts, roomy = facts_of(config), Machines(1, 4, 64 * GIB, 64 * GIB)
    needed = make_plan(config, facts, roomy)
    assert needed.fits
    assert not needed.changes
    lacking = Machines(1, 4, int((needed.bytes_per_card_max - needed.communicators) * 0.6), 64 * GIB)
    without_hccl = changed(config, {"device.backend": "cpu"})
    tried: list[str] = []
    plan = make_plan(without_hccl, facts, lacking, tell=tried.append)
    assert not plan.fits
    assert "a card needs" in plan.problems[0]
    assert {"train.recompute": True} in [change.settings for change in plan.changes]
    assert len(tried) == len(plan.changes)
    helping = [change for change in plan.changes if change.fits and change.settings]
    assert helping
    for change in helping[:2]:
        again = make_plan(changed(without_hccl, change.settings), facts, lacking)
        assert again.fits
        assert again.bytes_per_card_max == change.bytes_per_card_max


def test_more_cards_are_no_help_against_what_each_of_them_holds() -> None:
    config, tried = small(), []
    plan = make_plan(config, facts_of(config), Machines(1, 4, 1024, 64 * GIB), tell=tried.append)
    assert not plan.fits
    assert not any("cards" in line for line in tried)
    together = [change for change in plan.changes if len(change.settings) > 1 and change.same_training]
    alone = {next(iter(c.settings)): c for c in plan.changes if len(c.settings) == 1}
    for change in together:  # only what helps by itself is combined
        for name in change.settings:
            needed = alone[name].bytes_per_card_max
            assert needed is not None
            assert needed < plan.bytes_per_card_max


def test_a_backbone_that_cannot_share_sequences_is_no_reason_against_the_rest() -> None:
    overrides = ["data.name=synthetic", "model.backbone=llama", "device.backend=cpu", "model.max_seq_len=32"]
    config = load_run_config("configs/quickstart.yaml", [*overrides, "train.batch_size=32"])
    plan = make_plan(config, facts_of(config), Machines(1, 4, 100, 64 * GIB))
    reasons = {str(change.settings): change.reason for change in plan.changes}
    assert "cannot share sequences" in reasons["{'parallel.context': 2}"]
    assert any(len(change.settings) > 1 and change.bytes_per_card_max for change in plan.changes)


def test_cards_without_a_sequence_are_mentioned() -> None:
    plan = make_plan(small(train__batch_size=3), facts_of(small()), Machines(1, 4, 64 * GIB, 64 * GIB))
    assert plan.notes == ["1 of 4 cards have no sequence: a batch is smaller"]


def test_a_catalogue_of_one_item_can_be_planned() -> None:
    config = changed(small(), {"data.options": {"items": 1, "categories": 1, "max_user_categories": 1}})
    assert make_plan(config, facts_of(config), Machines(1, 4, 64 * GIB, 64 * GIB)).fits


def test_communicators_of_hccl_count() -> None:
    config = small()
    machines = Machines(1, 4, 64 * GIB, 64 * GIB)
    assert make_plan(config, facts_of(config), machines).communicators == 2 * 200 * 2**20
    config.cluster.env = {"HCCL_BUFFSIZE": "100"}
    shared = changed(config, {"parallel.context": 2})
    assert make_plan(shared, facts_of(config), machines).communicators == 2 * 2 * 100 * 2**20
    on_cuda = changed(config, {"device.backend": "cuda"})
    assert make_plan(on_cuda, facts_of(config), machines).communicators == 0


def test_cards_with_a_sequence_more_than_others_are_the_imbalance() -> None:
    plan = make_plan(small(train__batch_size=6), facts_of(small()), Machines(1, 4, GIB, GIB))
    assert plan.load.sequences == 2
    assert plan.imbalance["tokens"] == pytest.approx(2 / 1.5)
    assert plan.imbalance["tables"] == pytest.approx(5_001 * 4 / 20_001)


def test_cards_and_nodes() -> None:
    config = small()  # cluster: one node of eight
    assert machines_of(config, None, None, None) == Machines(1, 8, 64 * GIB, 1536 * GIB)
    assert machines_of(config, 1024, None, "32GiB") == Machines(128, 8, 32 * GIB, 1536 * GIB)
    assert machines_of(config, 12, 3, None).cards_per_node == 4
    assert machines_of(config, 4, None, None) == Machines(1, 4, 64 * GIB, 1536 * GIB)
    assert machines_of(config, None, 4, None).cards == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cards", 12), "12 cards cannot be divided over nodes of 8; give --nodes"),
        (("--cards", 12, "--nodes", 5), "12 cards cannot be divided over 5 nodes"),
        (("--cards", 100_000), "100,000 cards: plans are made for up to 4,096"),
        (("--memory", "many"), "--memory: 'many' is no size; write it as 64GiB"),
        (("--length", 500), "--length 500: the model sees 1 to 200 events (model.max_seq_len)"),
        (("--cards", 8, "--set", "parallel.context=3"), "parallel.context: 8 cards cannot be divided into groups of 3"),
        (
            ("--set", "embedding.engine=torchrec", "--set", "embedding.optimizer=sgd"),
            "embedding.engine: TorchRec places its tables itself; plan with engine native",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[object, ...], message: str) -> None:
    done = npu_rec("plan", "configs/quickstart.yaml", "--set", "data.name=synthetic", *arguments)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_a_rank_is_simulated_by_the_training_command(tmp_path: Path) -> None:
    arguments = ("train", "configs/quickstart.yaml", "--set", "data.name=synthetic", "--simulate-ranks", 16)
    document = npu_rec_json(*arguments, "--rank", 15, cwd=tmp_path)
    assert (document["simulated_ranks"], document["rank"]) == (16, 15)
    assert document["memory"]["tables"] == (20_001 - 15 * 1_251) * 64 * 4
    assert {movement["what"] for movement in document["movements"]} >= {"rows to their readers", "gradients"}
    assert not list(tmp_path.iterdir())  # nothing was trained, nothing written
    refused = npu_rec(*arguments, "--rank", 16, cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (2, "error: --rank 16: the 16 ranks are 0 to 15\n")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--rank", 3), {}, "--rank is for --simulate-ranks; torchrun numbers the ranks of a training"),
        (
            ("--simulate-ranks", 8, "--run-dir", "x"),
            {},
            "--simulate-ranks trains nothing: leave out --run-dir and --resume",
        ),
        (
            ("--simulate-ranks", 8),
            {"WORLD_SIZE": "2", "RANK": "0"},
            "a simulated rank needs a process of its own, outside of torchrun",
        ),
    ],
)
def test_training_and_simulating_are_kept_apart(
    arguments: tuple[object, ...], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    settings = ("configs/quickstart.yaml", "--set", "data.name=synthetic")
    done = npu_rec("train", *settings, *arguments, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
    assert not list(tmp_path.iterdir())
