"""Context parallel: sequences spread over ranks, with the results and gradients of one process."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from context_ranks import ATTENTION, BACKBONES, LONG, Results, SavedBytes, rank_process
from fake_npu.harness import needs_fake_npu, processes_on_npu
from gloo_ranks import on_ranks
from hypothesis import given
from hypothesis import strategies as st
from strategies import Place, assert_all_close, examples, lengths, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.distributed import World
from npu_rec.distributed.context import ContextShard, context_shard
from npu_rec.distributed.context_attention import context_attention
from npu_rec.distributed.world import ALONE
from npu_rec.models.backbone import Layout
from npu_rec.ops.jagged import lengths_to_offsets

CPU = Place("cpu", torch.float64)
BY_TOKEN = ("out", "q", "k", "v", "x")


def ranks_of(folder: Path, count: int) -> list[dict[str, Results]]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]


def run_ranks(folder: Path, count: int, *, long: bool = False) -> list[dict[str, Results]]:
    """`rank_process` in `count` gloo processes; what each left."""
    on_ranks(count, rank_process, count, folder / "store", long)
    return ranks_of(folder, count)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return run_ranks(tmp_path_factory.mktemp("two"), 2, long=True)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return run_ranks(tmp_path_factory.mktemp("three"), 3)


def together(parts: list[Results]) -> Results:
    """Rows of tokens in the order of the batch; the sums of everything else."""
    tokens = torch.cat([part["tokens"] for part in parts])
    order = tokens.argsort()
    assert torch.equal(tokens[order], torch.arange(len(tokens)))
    names = [name for name in parts[0] if name != "tokens"]
    return {
        name: torch.cat([part[name] for part in parts])[order]
        if name in BY_TOKEN
        else torch.stack([part[name] for part in parts]).sum(0)
        for name in names
    }


def check_attention(parts: list[Results], name: str, tolerance: float) -> None:
    found = {key: x.double() for key, x in together(parts).items()}
    assert_all_close(found, ATTENTION[name].run("reference", CPU), tolerance)


def check_backbone(parts: list[Results], name: str, tolerance: float) -> None:
    found = {key: x.double() for key, x in together(parts).items()}
    assert_all_close(found, BACKBONES[name].run(torch.device("cpu"), torch.float64, None), tolerance)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("ranks", ["two", "three"])
def test_attention_and_its_gradients_equal_one_process(ranks: str, name: str, request: pytest.FixtureRequest) -> None:
    check_attention([rank[name] for rank in request.getfixturevalue(ranks)], name, CPU.tolerance)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("ranks", ["two", "three"])
def test_a_backbone_with_dropout_and_times_equals_one_process(
    ranks: str, name: str, request: pytest.FixtureRequest
) -> None:
    check_backbone([rank[name] for rank in request.getfixturevalue(ranks)], name, CPU.tolerance)


def test_one_sequence_of_8192_tokens_on_two_ranks_equals_one_rank(two: list[dict[str, Results]]) -> None:
    saved = SavedBytes()
    with saved:
        expected = LONG.run(torch.device("cpu"), torch.float32, None)
    assert expected["out"].shape == (8192, 16)
    found = together([rank["long"] for rank in two])
    assert_all_close(found, expected, 2e-5)
    for rank in two:
        assert len(rank["long"]["tokens"]) == 4096
        # two layers, forward and backward: exactly half of the pairs of one rank in each
        assert rank["work"]["pairs"].tolist() == [8192 * 8193 // 4] * 4
        assert int(rank["work"]["saved"]) < 0.52 * saved.total  # nothing of the other rank's tokens is kept


@needs_fake_npu
def test_two_ranks_on_the_fake_npu_equal_one_process(tmp_path: Path) -> None:
    processes_on_npu("../../context_ranks.py", 2, tmp_path, strict=True)
    ranks = ranks_of(tmp_path, 2)
    for name in ATTENTION:
        check_attention([rank[name] for rank in ranks], name, 2e-5)
    for name in BACKBONES:
        check_backbone([rank[name] for rank in ranks], name, 2e-4)


# --- who holds what


def shards(size: int, drawn: tuple[int, ...]) -> list[ContextShard]:
    offsets = lengths_to_offsets(torch.tensor(drawn, dtype=torch.int64))
    return [context_shard(World(rank, size), offsets, torch.arange(sum(drawn)) * 60) for rank in range(size)]


def pieces_of(shard: ContextShard, drawn: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the batch that are queries and keys of each piece, from the definition."""
    rank, size = shard.world.rank, shard.world.size
    queries, keys, start = [], [], 0
    for n in drawn:
        bounds = [c * n // (2 * size) for c in range(2 * size + 1)]
        for c in (rank, 2 * size - 1 - rank):
            queries.append([start + p for p in range(bounds[c], bounds[c + 1])])
            keys.append([start + p for p in range(bounds[c + 1])] if queries[-1] else [])
        start += n
    return queries, keys


@examples(60)
@given(st.integers(1, 5), lengths(129))
def test_pieces_are_those_of_the_definition(size: int, drawn: tuple[int, ...]) -> None:
    ranks = shards(size, drawn)
    everything = torch.cat([shard.tokens for shard in ranks])
    assert everything.sort().values.tolist() == list(range(sum(drawn)))
    starts = [start for i, n in enumerate(drawn) for start in [sum(drawn[:i])] * n]
    for shard in ranks:
        queries, keys = pieces_of(shard, drawn)
        assert shard.tokens.tolist() == list(chain(*queries))
        assert shard.positions.tolist() == [token - starts[token] for token in shard.tokens.tolist()]
        assert shard.query_offsets.diff().tolist() == [len(piece) for piece in queries]
        assert shard.key_offsets.diff().tolist() == [len(piece) for piece in keys]
        assert shard.key_times is not None
        assert (shard.key_times // 60).tolist() == list(chain(*keys))
        for other in ranks:  # what one sends is what the other expects
            assert shard.send_counts[other.world.rank] == other.receive_counts[shard.world.rank]
        received = torch.cat([other.tokens[other.sends.split(other.send_counts)[shard.world.rank]] for other in ranks])
        assert received[shard.keys].tolist() == list(chain(*keys))


def test_long_sequences_are_about_the_same_work_on_every_rank() -> None:
    for size in (2, 4, 7):
        work = []
        for shard in shards(size, (1000, 1531, 4097)):
            queries, keys = shard.query_offsets.diff(), shard.key_offsets.diff()
            work.append(int((queries * keys - queries * (queries - 1) // 2).sum()))
        assert max(work) < 1.01 * sum(work) / size


def test_one_rank_alone_holds_everything() -> None:
    values = torch.arange(7.0).unsqueeze(1)
    shard = context_shard(ALONE, torch.tensor([0, 4, 4, 7]))
    assert torch.equal(shard.local(values), values)
    assert shard.offsets.tolist() == [0, 4, 4, 7]
    assert shard.key_times is None
    halves = [0, 1, *range(4), 4, *range(4, 7)]
    assert shard.gather(values, "test").flatten().tolist() == halves
    counted: Tensor = shard.scatter_add(torch.ones(len(halves), 1), "test")
    assert counted.flatten().tolist() == [float(halves.count(token)) for token in range(7)]


def test_a_layout_gives_the_places_and_key_times_of_the_tokens_here() -> None:
    times = torch.tensor([5, 6, 7, 8, 100, 101])
    offsets = torch.tensor([0, 4, 6])
    whole = Layout(offsets, 4, times)
    assert whole.positions(6).tolist() == [0, 1, 2, 3, 0, 1]
    assert whole.key_times is times
    # two ranks, four chunks: [5] [6] [7] [8] and [] [100] [] [101]
    parts = [context_shard(World(rank, 2), offsets, times) for rank in (0, 1)]
    layouts = [Layout(part.offsets, 4, part.local(times), context=part) for part in parts]
    assert [x.offsets.tolist() for x in layouts] == [[0, 2, 3], [0, 2, 3]]
    assert [x.times.tolist() for x in layouts if x.times is not None] == [[5, 8, 101], [6, 7, 100]]
    assert [x.positions(3).tolist() for x in layouts] == [[0, 3, 1], [1, 2, 0]]
    keys = [x.key_times.tolist() for x in layouts if x.key_times is not None]
    assert keys == [[5, 5, 6, 7, 8, 100, 101], [5, 6, 5, 6, 7, 100]]


def test_tokens_of_another_shard_are_an_error() -> None:
    shard = context_shard(ALONE, torch.tensor([0, 4]))
    x = torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match=r"q, k, v must have the 4 tokens of the shard, got \[3, 3, 3\]"):
        context_attention(x, x, x, shard, max_seq_len=4)
