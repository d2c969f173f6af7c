"""Benchmarks: what a row says, and the suites that are not run by the tests of the commands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import npu_rec
from strategies import one_thread  # noqa: F401
from torch import Tensor

from npu_rec.bench import attention, embedding, run_suite
from npu_rec.bench.harness import Contender, compare
from npu_rec.bench.train_step import attention_saved
from npu_rec.data.stochastic_length import StochasticLength
from npu_rec.device import get_device
from npu_rec.distributed.balance import SequenceCost
from npu_rec.ops import RowOptimizer, embedding_lookup

CPU = get_device("cpu")


def test_a_contender_that_learns_is_timed_with_its_update() -> None:
    table = torch.zeros(9, 4, requires_grad=True)
    optimizer = RowOptimizer("sgd", 1.0)

    def lookup(ids: Tensor, table: Tensor) -> Tensor:
        return embedding_lookup(table, ids, optimizer=optimizer)

    contenders = [
        Contender("gradient", lambda ids, table: table[ids], (table,)),
        Contender("update", lookup, (table,), learn=Tensor.backward),
    ]
    ids = torch.tensor([1, 1, 5])
    rows = compare("name", "shape", contenders, [(ids,)], CPU, repeats=3, table_rows=3)
    runs = optimizer.step
    assert runs >= 3
    assert table[:, 0].tolist() == [0, -2 * runs, 0, 0, 0, -runs, 0, 0, 0]
    assert [row.backend for row in rows] == ["gradient", "update"]
    assert rows[0].speedup == 1.0
    for row in rows:
        assert row.rows_per_second == pytest.approx(3 / (row.total_ms * 1e-3))
    (without,) = compare("name", "shape", contenders[:1], [(ids,)], CPU, repeats=1)
    assert without.rows_per_second is None


@pytest.mark.parametrize("name", ["norm-gate", "embedding"])
def test_suites_begin_each_case_with_plain_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "LARGE", ((3_000, 8),))
    monkeypatch.setattr(embedding, "_fbgemm", lambda table: "FBGEMM: not timed")
    rows = run_suite(name, CPU, repeats=1)
    if name == "embedding":
        missing = rows.pop()
        assert (missing.backend, missing.speedup, missing.rows_per_second) == ("FBGEMM: not timed", 0.0, None)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    assert len(shapes) == {"norm-gate": 2, "embedding": 5}[name]
    for shape in shapes:
        case = [row for row in rows if row.shape == shape]
        assert len({row.backend for row in case}) == len(case)
        assert "PyTorch" in case[0].backend
        assert case[0].speedup == 1.0
        assert all((row.rows_per_second is not None) == (name == "embedding") for row in case)
        if shape.endswith("with update"):
            assert case[-1].backend == "reference, rowwise_adagrad"


def test_attention_of_both_kinds_begins_with_its_padded_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "RAGGED", [(40, 2, 8, [40, 7])])
    rows = run_suite("attention", CPU, repeats=1)
    for name, kind in (("attention", ""), ("softmax_attention", "softmax, ")):
        own = [row for row in rows if row.name == name]
        assert {row.shape for row in own} == {f"{kind}B=2 N=40 H=2 D=8 T=47"}
        assert (own[0].backend, own[0].speedup) == ("padded PyTorch", 1.0)
        assert {"cpp", "tiled"} >= {row.backend for row in own[1:]} >= {"tiled"}
    assert {row.name for row in rows} == {"attention", "softmax_attention"}


def test_more_threads_than_a_process_can_have_are_refused() -> None:
    done = npu_rec("bench", "norm-gate", "--threads", 100_000_000, "--repeats", 1)
    assert done.returncode == 2
    assert "--threads" in done.stderr
    assert "4096" in done.stderr


@pytest.mark.parametrize("alpha", [1.6, 1.8])
def test_attention_saved_is_what_the_rule_promises(alpha: float) -> None:
    rule = StochasticLength(alpha, 4096, 3, "recent")
    lengths = np.random.default_rng(0).integers(1, 4097, 64)
    read = [rule.lengths(epoch, np.arange(64), lengths) for epoch in range(64)]
    saved, expected = attention_saved(SequenceCost(0.0, 7.0), rule, lengths, read)
    pairs = 0.0
    for n in lengths.tolist():  # in plain words
        part = int(4096 ** (alpha / 2))
        chance = 1.0 if n <= part else 4096**alpha / n**2
        pairs += chance * n * (n + 1) / 2 + (1 - chance) * part * (part + 1) / 2
    assert expected == pytest.approx(1 - pairs / sum(n * (n + 1) / 2 for n in lengths.tolist()))
    assert saved == pytest.approx(expected, rel=0.05)
    assert saved != expected
