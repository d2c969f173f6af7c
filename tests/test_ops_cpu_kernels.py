"""The compiled CPU kernels on every instruction set of this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from conftest import npu_rec, npu_rec_json
from strategies import AttentionCase, Place, assert_all_close
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import (
    OPERATORS,
    RowOptimizer,
    dropout,
    embedding_lookup,
    norm_gate,
    rms_norm,
    rotary,
    sampled_softmax_loss,
    softmax_attention,
    swiglu,
)
from npu_rec.ops.compiled import ISA_VARIABLE, extension, instruction_set, unusable
from npu_rec.ops.random import dropout_scale, random_key

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


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", CASES)
def test_softmax_attention_equals_the_float64_reference(isa: str, name: str, dropout: float) -> None:
    got = CASES[name].run_softmax("cpp", Place("cpu", torch.float32), dropout)
    assert_all_close(got, CASES[name].run_softmax("reference", Place("cpu", torch.float64), dropout), 2e-5)


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
    for run in (CASES["plain"].run, CASES["plain"].run_softmax):
        first, second = (run("cpp", place) for _ in range(2))
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


def test_a_row_of_softmax_attention_without_a_number_stays_alone(isa: str) -> None:
    x = torch.randn(3, 70, 1, 5, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 70])
    clean = softmax_attention(*x, offsets, max_seq_len=70, backend="cpp")
    x[0, 20] = math.nan
    out = softmax_attention(*x, offsets, max_seq_len=70, backend="cpp")
    assert bool(out[20].isnan().all())
    assert torch.equal(out[:20], clean[:20])
    assert torch.equal(out[21:], clean[21:])


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "sve9")
    with pytest.raises(BackendError, match=r"sve9.*plain"):
        instruction_set()
    x = torch.zeros(1, 2)
    for backend in ("auto", "cpp"):  # auto does not go on to a slower backend without a word
        with pytest.raises(BackendError, match=r"NPU_REC_CPU_ISA=sve9: .*plain"):
            norm_gate(x, x, backend=backend)
    for operator in OPERATORS.values():
        reasons = operator.availability(torch.device("cpu"))
        assert "sve9" in (reasons.get("cpp") or "sve9")
        assert reasons["reference"] is None


@pytest.mark.parametrize("wanted", ["plain", "sve9"])
def test_doctor_says_which_instruction_set_is_used_or_why_none(wanted: str) -> None:
    document = npu_rec_json("doctor", env={ISA_VARIABLE: wanted})
    reason = None if wanted == "plain" else "NPU_REC_CPU_ISA=sve9: this machine and build have "
    assert document["cpp_instruction_set"] == ("plain" if reason is None else None)
    if document["selected"] == "cpu":
        for backends in document["operators"].values():
            if "cpp" in backends:
                assert (backends["cpp"] is None) if reason is None else backends["cpp"].startswith(reason)
    shown = npu_rec("doctor", env={ISA_VARIABLE: wanted}).stdout
    assert f"instruction set of cpp: {'plain' if reason is None else f'none: {reason}'}" in shown


def test_an_empty_instruction_set_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    fastest = instruction_set()
    monkeypatch.setenv(ISA_VARIABLE, "")
    assert instruction_set() == fastest


def test_too_many_rows_go_to_another_backend() -> None:
    operator = OPERATORS["sampled_softmax_loss"]
    request = operator.sample(torch.device("cpu"))
    many = torch.zeros(1, 64).expand(10**7, 64)
    wide = type(request)(torch.zeros(4, 64), many, request.positives, request.negatives, None, 0.05, True)
    assert "exceed" in str(operator.find("cpp").supports(wide))
    assert operator.select(wide, "auto").name == "chunked"


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


# --- norm_gate

LOW = [torch.bfloat16, torch.float16]


def gate_inputs(tokens: int, width: int, affine: bool, dtype: torch.dtype) -> list[Tensor]:
    """x and gate as columns of a wider tensor, so that their rows lie apart; weight and bias."""
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(tokens, 2 * width + 3, generator=generator).to(dtype)
    parameters = list(torch.randn(2, width, generator=generator)) if affine else []
    return [wide[:, 1 : width + 1], wide[:, width + 2 : 2 * width + 2], *parameters]


def gated(leaves: list[Tensor], dropout: float, backend: str) -> list[Tensor]:
    """The output and the gradients of the leaves, for a gradient that is a transposed tensor."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    tokens, width = leaves[0].shape
    keys = random_key(3, "dropout", torch.arange(tokens))
    out = norm_gate(*leaves, dropout=dropout, dropout_keys=keys, backend=backend)
    grad = torch.randn(width, tokens, generator=torch.Generator().manual_seed(5)).bfloat16().to(out).t()
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("width", [3, 4, 15, 16, 17, 50, 64, 200])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gate_equals_the_float64_reference(isa: str, width: int, affine: bool, dropout: float) -> None:
    leaves = gate_inputs(19, width, affine, torch.float32)
    wanted = gated([x.double() for x in leaves], dropout, "reference")
    for got, value in zip(gated(leaves, dropout, "cpp"), wanted, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=0, atol=2e-5 * float(value.abs().max()))


@pytest.mark.parametrize("width", [3, 50, 64])
@pytest.mark.parametrize("dtype", LOW)
def test_gate_in_low_precision_is_rounded_once(isa: str, width: int, dtype: torch.dtype) -> None:
    leaves = gate_inputs(19, width, True, dtype)
    wanted = gated([x.double() for x in leaves], 0.3, "reference")
    for got, value in zip(gated(leaves, 0.3, "cpp"), wanted, strict=True):
        step = torch.finfo(got.dtype).eps
        allowed = 0.51 * step * value.abs() + 2e-5 * float(value.abs().max())
        assert bool(((got.double() - value).abs() <= allowed).all())


@pytest.mark.parametrize("probability", [1e-9, 0.2, 0.5, 1 - 2**-30])
def test_gate_multiplies_by_the_very_numbers_of_dropout_scale(isa: str, probability: float) -> None:
    drawn = random_key(1, "dropout", torch.arange(500))
    keys = torch.cat([drawn, torch.tensor([0, -1, 1, 2**63 - 1, -(2**63), 2**32, -(2**31)])])
    ones = torch.ones(len(keys), 77)
    out = norm_gate(ones, ones, bias=ones[0], dropout=probability, dropout_keys=keys, backend="cpp")
    assert torch.equal(out, dropout_scale(keys, 77, probability))


@pytest.mark.usefixtures("three_threads")
def test_gate_on_three_threads_gives_the_same_bits_each_time(isa: str) -> None:
    leaves = gate_inputs(3000, 70, True, torch.float32)
    first, second = (gated(leaves, 0.2, "cpp") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wanted = gated([x.double() for x in leaves], 0.2, "reference")
    for got, value in zip(first, wanted, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=0, atol=2e-5 * float(value.abs().max()))


# --- rms_norm, swiglu, rotary, dropout


def blocks(name: str, tokens: int, width: int, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of the leaves, for rows that lie apart and a gradient that is a transposed tensor.

    Inputs are numbers of `dtype`, in float64 for the reference. Heads of `rotary` are twice as wide as `width`.
    """
    seed = torch.Generator().manual_seed(width)
    wide, angles = torch.randn(tokens, 6 * width + 1, generator=seed), torch.randn(tokens, 2 * width, generator=seed)
    weight = torch.randn(width, generator=seed)
    of = torch.float64 if backend == "reference" else dtype
    wide, weight, cos, sin = (x.to(dtype).to(of) for x in (wide, weight, angles.cos(), angles.sin()))
    if name == "rms_norm":
        leaves = [wide[:, 1 : width + 1], weight]
    elif name == "swiglu":
        leaves = [4 * wide[:, 1 : 2 * width + 1]]
    else:
        leaves = [wide[:, 1:].unflatten(1, (3, 2 * width))[:, 1:]]
    leaves = [x.detach().requires_grad_() for x in leaves]
    if name == "rms_norm":
        out = rms_norm(*leaves, eps=1e-6, backend=backend)
    elif name == "swiglu":
        out = swiglu(*leaves, backend=backend)
    else:
        out = rotary(*leaves, cos, sin, interleaved=name != "rotary", backend=backend)
    grad = torch.randn(out.shape[::-1], generator=torch.Generator().manual_seed(5)).bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.permute(*range(out.dim() - 1, -1, -1)))]


BLOCKS = ["rms_norm", "swiglu", "rotary", "rotary, interleaved"]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("width", [1, 3, 4, 15, 16, 17, 50, 64, 200])
def test_blocks_equal_the_float64_reference(isa: str, name: str, width: int) -> None:
    wanted = blocks(name, 19, width, "reference", torch.float32)
    for got, value in zip(blocks(name, 19, width, "cpp", torch.float32), wanted, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=0, atol=2e-5 * float(value.abs().max()))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("width", [3, 50, 64])
@pytest.mark.parametrize("dtype", LOW)
def test_blocks_in_low_precision_are_rounded_once(isa: str, name: str, width: int, dtype: torch.dtype) -> None:
    wanted = blocks(name, 19, width, "reference", dtype)
    for got, value in zip(blocks(name, 19, width, "cpp", dtype), wanted, strict=True):
        assert got.dtype == dtype
        allowed = 0.51 * torch.finfo(dtype).eps * value.abs() + 2e-5 * float(value.abs().max())
        assert bool(((got.double() - value).abs() <= allowed).all())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_bits_of_blocks_do_not_depend_on_the_threads(isa: str, name: str, three_threads: None) -> None:
    on_three = blocks(name, 40_000, 20, "cpp", torch.float32)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(on_three, blocks(name, 40_000, 20, "cpp", torch.float32), strict=True))
    wanted = blocks(name, 40_000, 20, "reference", torch.float32)
    for got, value in zip(on_three, wanted, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=0, atol=2e-5 * float(value.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("probability", [1e-9, 0.2, 0.5, 1 - 2**-30, 1 - 2**-40])
def test_dropout_has_the_bits_of_the_reference(isa: str, probability: float, dtype: torch.dtype) -> None:
    drawn = random_key(1, "dropout", torch.arange(3000))
    keys = torch.cat([drawn, torch.tensor([0, -1, 1, 2**63 - 1, -(2**63), 2**32, -(2**31)])])
    x = torch.randn(len(keys), 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = (dropout(x, probability, keys, backend=backend) for backend in ("cpp", "reference"))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


# --- embedding_lookup


def occurrences(rows: int, tokens: int) -> Tensor:
    """Ids of which a few are frequent, the first and the last row among them."""
    generator = torch.Generator().manual_seed(tokens)
    ids = (torch.rand(tokens, generator=generator) ** 4 * rows).long()
    ids[: tokens // 8] = rows - 1
    return ids[torch.randperm(tokens, generator=generator)]


@pytest.mark.parametrize(("rows", "width"), [(1, 3), (40, 1), (40, 16), (5000, 50), (100_000, 17)])
def test_lookup_gradients_equal_the_float64_reference(isa: str, rows: int, width: int) -> None:
    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    ids = occurrences(rows, 1000)
    weights = torch.randn(1000, width, generator=torch.Generator().manual_seed(1))
    results = []
    for backend, leaf in (("cpp", table), ("reference", table.double())):
        leaf.requires_grad_()
        out = embedding_lookup(leaf, ids, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, weights.to(out))))
    assert torch.equal(results[0][0].double(), results[1][0])
    torch.testing.assert_close(results[0][1].double(), results[1][1], rtol=1e-5, atol=1e-5)


def updated(table: Tensor, ids: Tensor, grads: Tensor, name: str, backend: str) -> list[Tensor]:
    """The table and the state of its optimiser after three steps."""
    table, optimizer = table.clone().requires_grad_(), RowOptimizer(name, 0.1, eps=1e-3, max_norm=4.0)  # type: ignore[arg-type]
    for scale in (1.0, -0.5, 0.25):
        embedding_lookup(table, ids, optimizer=optimizer, backend=backend).backward((grads * scale).to(table))
    return [x for x in (table.detach(), optimizer.square, optimizer.momentum) if x is not None]


@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad", "rowwise_adam"])
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (40, 1), (5000, 50), (100_000, 17)])
def test_updates_equal_the_float64_reference(isa: str, name: str, rows: int, width: int) -> None:
    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    ids, grads = occurrences(rows, 1000), torch.randn(1000, width, generator=torch.Generator().manual_seed(1))
    wanted = updated(table.double(), ids, grads, name, "reference")
    for got, value in zip(updated(table, ids, grads, name, "cpp"), wanted, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", LOW)
def test_every_number_of_16_bits_is_read_summed_and_rounded_as_pytorch_does(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.int16).view(dtype).view(-1, 1)
    others = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for width in (1, 16, 23):  # part of a vector, a whole one, both
        grads = torch.cat([every, others]).expand(-1, width).contiguous()
        ids = torch.arange(2**16).repeat(2)
        table = torch.zeros(2**16, width, dtype=dtype, requires_grad=True)
        embedding_lookup(table, ids, backend="cpp").backward(grads)
        sums = (every.float() + others.float()).to(dtype).expand(-1, width)
        assert table.grad is not None
        torch.testing.assert_close(table.grad, sums, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad", "rowwise_adam"])
def test_the_bits_of_updates_and_gradients_do_not_depend_on_the_threads(
    isa: str, name: str, three_threads: None
) -> None:
    table = torch.randn(7000, 30, generator=torch.Generator().manual_seed(0))
    ids, grads = occurrences(7000, 40_000), torch.randn(40_000, 30, generator=torch.Generator().manual_seed(1))

    def run() -> list[Tensor]:
        leaf = table.clone().requires_grad_()
        dense = torch.autograd.grad(embedding_lookup(leaf, ids, backend="cpp"), leaf, grads)[0]
        return [dense, *updated(table, ids, grads, name, "cpp")]

    on_three = run()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(on_three, run(), strict=True))


def test_tables_that_the_kernels_do_not_take_are_refused_with_a_reason() -> None:
    operator = OPERATORS["embedding_lookup"]
    ids = torch.tensor([0])
    for table, reason in (
        (torch.zeros(4, 6)[:, ::2], "not contiguous"),
        (torch.zeros(3, 4).t(), "not contiguous"),
        (torch.zeros(4, 3, dtype=torch.float64), "float64"),
    ):
        with pytest.raises(BackendError, match=reason):
            embedding_lookup(table, ids, backend="cpp")
        assert torch.equal(embedding_lookup(table, ids), table[:1])
    assert operator.find("cpp").supports(operator.sample(torch.device("cpu"))) is None


def test_a_gradient_for_an_id_outside_the_table_is_an_error_not_a_write() -> None:
    with pytest.raises(IndexError, match="id 4 is out of range of a table of 4 rows"):
        torch.ops.npu_rec.embedding_lookup_backward(torch.ones(1, 3), torch.zeros(4, 3), torch.tensor([4]), "cpp")
