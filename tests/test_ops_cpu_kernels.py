"""The compiled CPU kernels on every instruction set of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import AttentionCase, Place

from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, sampled_softmax_loss
from npu_rec.ops.compiled import ISA_VARIABLE, extension, instruction_set, unusable

if unusable() is not None:
    pytest.skip(f"cpp kernels: {unusable()}", allow_module_level=True)

CASES = {
    "plain": AttentionCase((0, 1, 64, 65, 200, 130), max_seq_len=200, qk_dim=25, v_dim=30, bias="time"),
    "tied": AttentionCase((70, 129), heads=3, qk_dim=1, v_dim=17, bias="time", times="tied"),
    "position": AttentionCase((128, 3), qk_dim=64, v_dim=64, bias="position", alpha=0.125),
    "unsorted": AttentionCase((100, 30), bias="time", times="unsorted"),
    "targets": AttentionCase((90, 66), (7, 66), bias="time"),
    "context and window": AttentionCase((90, 129), contextual_seq_len=3, max_attn_len=20, min_full_attn_seq_len=9),
    "both ways": AttentionCase((90, 65), causal=False, bias="time"),
}


@pytest.fixture(params=extension().instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    assert instruction_set() == request.param
    return str(request.param)


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_float64_reference(isa: str, name: str) -> None:
    got = CASES[name].run("cpp", Place("cpu", torch.float32))
    wanted = CASES[name].run("reference", Place("cpu", torch.float64))
    for part, value in wanted.items():
        scale = float(value.abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(got[part].double(), value, rtol=0, atol=2e-5 * scale + 1e-7, msg=f"{isa} {part}")


@pytest.mark.parametrize(("width", "negatives"), [(1, 3), (50, 128), (64, 16), (129, 1), (16, 0)])
@pytest.mark.parametrize("log_q", [False, True])
def test_loss_equals_the_float64_reference(isa: str, width: int, negatives: int, log_q: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(40, width, generator=generator))
    queries = torch.nn.functional.normalize(torch.randn(33, width, generator=generator))
    drawn = torch.randint(40, (33, negatives + 1), generator=generator)
    q = torch.rand(40, generator=generator).log() if log_q else None
    weights = torch.rand(33, generator=generator)
    results = []
    for backend, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (queries, rows)]
        log = None if q is None else q.to(dtype)
        loss = sampled_softmax_loss(*leaves, drawn[:, 0], drawn[:, 1:], temperature=0.05, log_q=log, backend=backend)
        results.append((loss, *torch.autograd.grad((loss * weights.to(dtype)).sum(), leaves)))
    for got, wanted in zip(*results, strict=True):
        scale = float(wanted.detach().abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=3e-5 * scale)


def test_the_same_threads_give_the_same_bits(isa: str) -> None:
    place = Place("cpu", torch.float32)
    first, second = (CASES["plain"].run("cpp", place) for _ in range(2))
    assert all(torch.equal(first[part], second[part]) for part in first)


def test_far_scores_are_finite_and_nan_shows(isa: str) -> None:
    q = torch.tensor([1e4, -1e4, math.nan]).view(3, 1, 1)
    one = torch.ones(3, 1, 1)
    offsets = torch.tensor([0, 1, 2, 3])
    out = torch.ops.npu_rec.hstu_attention(
        q, one, one, offsets, None, None, None, None, None, 4, 1.0, 1.0, True, 0, 0, 0, "cpp"
    ).flatten()
    assert float(out[0]) == pytest.approx(1e4)
    assert float(out[1]) == pytest.approx(0.0, abs=1e-30)
    assert math.isnan(float(out[2]))


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "sve9")
    with pytest.raises(BackendError, match=r"sve9.*plain"):
        instruction_set()


def test_too_many_rows_go_to_another_backend() -> None:
    operator = OPERATORS["sampled_softmax_loss"]
    request = operator.sample(torch.device("cpu"))
    many = torch.zeros(1, 64).expand(10**7, 64)
    wide = type(request)(torch.zeros(4, 64), many, request.positives, request.negatives, None, 0.05, True)
    assert "exceed" in str(operator.find("cpp").supports(wide))
    assert operator.select(wide, "auto").name == "chunked"
