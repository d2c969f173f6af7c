"""`norm_gate`, `embedding_lookup` and the jagged conversions through Ascend's operators, with stand-ins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import vendor_standins_small as vendor
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    assert_all_close,
    examples,
    forward_and_gradients,
    generator,
    normal,
    one_thread,  # noqa: F401
    opcheck,
)
from torch import Tensor
from vendor_standins import registered

from npu_rec.ops import OPERATORS, RowOptimizer, embedding_lookup, jagged_vendor, norm_gate
from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest
from npu_rec.ops.jagged import jagged_to_padded, lengths_to_offsets, padded_to_jagged
from npu_rec.ops.norm_gate_request import NormGateRequest
from npu_rec.ops.row_optimizer import RowUpdate

NORM_GATE = OPERATORS["norm_gate"].find("vendor")
LOOKUP = OPERATORS["embedding_lookup"].find("vendor")


# --- norm_gate


def gate_leaves(width: int, affine: bool) -> dict[str, Tensor]:
    seed = generator(3)
    leaves = {"x": normal(seed, 6, width), "gate": normal(seed, 6, width)}
    if affine:
        leaves |= {"weight": normal(seed, width), "bias": normal(seed, width)}
    return leaves


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("stand_ins", "width", "eps"),
    [
        (vendor.NORM_MULTIPLY_DROPOUT, 512, 1e-6),
        (vendor.LN_MUL, 50, 1e-5),
        (vendor.NORM_MULTIPLY_DROPOUT + vendor.LN_MUL, 50, 1e-5),
    ],
    ids=["norm_multiply_dropout", "ln_mul", "both"],
)
def test_norm_gate_equals_the_reference(affine: bool, stand_ins: list[vendor.StandIn], width: int, eps: float) -> None:
    leaves = gate_leaves(width, affine)
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    expected = forward_and_gradients(lambda **x: norm_gate(**x, eps=eps, backend="reference"), exact, 1)
    with registered(*stand_ins):
        actual = forward_and_gradients(lambda **x: norm_gate(**x, eps=eps, backend="vendor"), leaves, 1)
    assert_all_close(actual, expected, 2e-5)


def test_norm_gate_without_dropout_does_not_mind_its_keys_or_probability() -> None:
    leaves = gate_leaves(512, False)
    with registered(*vendor.NORM_MULTIPLY_DROPOUT):
        plain = norm_gate(**leaves, backend="vendor")
        assert torch.equal(norm_gate(**leaves, dropout=0.5, backend="vendor"), plain)
        assert torch.equal(norm_gate(**leaves, dropout_keys=torch.arange(6), backend="vendor"), plain)
        x, gate = leaves.values()
        opcheck("norm_gate", "vendor", (x, gate, None, None, None, 1e-6, 0.0, "vendor"))


def gate(tokens: int = 4, width: int = 512, dtype: torch.dtype = torch.float32, eps: float = 1e-6) -> NormGateRequest:
    x = torch.zeros(tokens, width, dtype=dtype)
    return NormGateRequest(x, x, None, None, None, eps, 0.0)


def test_norm_gate_names_the_missing_packages() -> None:
    assert NORM_GATE.supports(gate()) == (
        "no mxrec::norm_multiply_dropout: rec_ops is for Ascend NPUs; no ops_rec::ln_mul: ops_rec is for Ascend NPUs"
    )


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (gate(width=256), "rows are 256 wide; 512 or 1024"),
        (gate(eps=1e-3), "eps is 0.001; 1e-10 to 1e-4"),
        (gate(eps=1e-11), "eps is 1e-11; 1e-10 to 1e-4"),
        (gate(tokens=0), "T is 0; 1 to 1000000"),
        (gate(dtype=torch.float64), "the dtype is torch.float64; float32, float16, bfloat16"),
    ],
)
def test_each_limit_of_norm_multiply_dropout(request_: NormGateRequest, reason: str) -> None:
    with registered(*vendor.NORM_MULTIPLY_DROPOUT):
        assert NORM_GATE.supports(request_) == (
            f"norm_multiply_dropout: {reason}; ln_mul: no ops_rec::ln_mul: ops_rec is for Ascend NPUs"
        )
        assert NORM_GATE.supports(gate(width=1024, dtype=torch.float16, eps=1e-4)) is None


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (gate(), "eps is 1e-06; it has 1e-05"),
        (gate(eps=1e-5, tokens=0), "T is 0; 1 to 2147483647"),
        (gate(eps=1e-5, width=2049), "C is 2049; 1 to 2048"),
        (gate(eps=1e-5, dtype=torch.bfloat16), "the dtype is torch.bfloat16; float32"),
        (
            dataclasses.replace(gate(eps=1e-5), weight=torch.ones(512, dtype=torch.float16)),
            "the dtype is torch.float16; float32",
        ),
    ],
)
def test_each_limit_of_ln_mul(request_: NormGateRequest, reason: str) -> None:
    with registered(*vendor.LN_MUL):
        found = NORM_GATE.supports(request_)
        assert found is not None
        assert found.endswith(f"; ln_mul: {reason}")
        assert NORM_GATE.supports(gate(eps=1e-5, width=2048)) is None


def test_dropout_by_keys_is_refused() -> None:
    drops = dataclasses.replace(gate(), dropout=0.1, dropout_keys=torch.arange(4))
    with registered(*vendor.NORM_MULTIPLY_DROPOUT):
        assert NORM_GATE.supports(drops) == "its dropout is not drawn from keys"


# --- embedding_lookup


@examples(60)
@given(
    name=st.sampled_from(["sgd", "rowwise_adagrad"]),
    ids=st.lists(st.integers(0, 6), max_size=12),
    spoiled=st.sampled_from([None, math.nan, math.inf]),
    seed=st.integers(0, 99),
)
def test_updates_equal_those_of_the_reference(name: str, ids: list[int], spoiled: float | None, seed: int) -> None:
    random = generator(seed)
    start, grads = normal(random, 7, 16), normal(random, 2, len(ids), 16)
    if spoiled is not None and ids:
        grads[0, 0, 3] = spoiled
    tables, states = {}, {}
    with registered(*vendor.ROW_UPDATES):
        for backend in ("vendor", "reference"):
            table = start.clone().requires_grad_()
            optimizer = RowOptimizer(name, lr=0.3)  # type: ignore[arg-type]
            for grad in grads:
                embedding_lookup(
                    table, torch.tensor(ids, dtype=torch.int64), optimizer=optimizer, backend=backend
                ).backward(grad)
            tables[backend], states[backend] = table.detach(), optimizer.square
            assert table.grad is None
    torch.testing.assert_close(tables["vendor"], tables["reference"], rtol=1e-5, atol=1e-6)
    if name == "rowwise_adagrad":
        torch.testing.assert_close(states["vendor"], states["reference"], rtol=1e-5, atol=1e-6)


def test_a_lookup_without_an_update_has_its_ordinary_gradient() -> None:
    table = normal(generator(1), 5, 8).requires_grad_()
    with registered(*vendor.ROW_UPDATES):
        embedding_lookup(table, torch.tensor([1, 1, 4]), backend="vendor").sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [0.0, 2.0, 0.0, 0.0, 1.0]


def lookup(
    name: str | None = "rowwise_adagrad",
    shape: tuple[int, int] = (4, 16),
    dtype: torch.dtype = torch.float32,
    ids: torch.dtype = torch.int64,
    eps: float = 1e-8,
    max_norm: float | None = None,
) -> EmbeddingLookupRequest:
    table = torch.zeros(shape, dtype=dtype)
    square = torch.zeros(shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    update = None if name is None else RowUpdate(name, 0.1, (0.9, 0.999), eps, max_norm, 1, square, None)  # type: ignore[arg-type]
    return EmbeddingLookupRequest(table, torch.zeros(3, dtype=ids), update)


def test_embedding_lookup_names_the_missing_package() -> None:
    operator = "fbgemm::split_embedding_backward_codegen_sgd_unweighted_exact_cuda"
    assert LOOKUP.supports(lookup("sgd")) == f"no {operator}: fbgemm_ascend is for Ascend NPUs"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (lookup(dtype=torch.bfloat16), "the dtype is torch.bfloat16; float32"),
        (lookup(shape=(4, 12)), "D is 12; 8 to 2147483640, a multiple of 8"),
        (lookup("rowwise_adam"), "has no rowwise_adam"),
        (lookup(max_norm=1.0), "has no max_norm of rows"),
        (lookup(eps=0.0), "eps is 0"),
        (lookup(ids=torch.int32), "ids are torch.int32; int64"),
        (dataclasses.replace(lookup(), table=torch.zeros(16, 4).t()), "the table is not contiguous"),
    ],
)
def test_each_limit_of_the_updates(request_: EmbeddingLookupRequest, reason: str) -> None:
    with registered(*vendor.ROW_UPDATES):
        assert LOOKUP.supports(request_) == reason
        assert LOOKUP.supports(lookup()) is None
        assert LOOKUP.supports(lookup("sgd", eps=0.0)) is None
        assert LOOKUP.supports(lookup(None)) is None


def test_the_scratch_of_an_update_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_rec.ops.embedding_lookup_vendor.MOST_SPACE", 4 * 16 * 4 - 1)
    with registered(*vendor.ROW_UPDATES):
        reason = LOOKUP.supports(lookup())
        assert LOOKUP.supports(lookup(None)) is None
    assert reason == "it allocates as much as the table: 0 MiB; up to 1024"


def test_fbgemms_own_signature_is_refused() -> None:
    """FBGEMM's operator of that name, for CUDA, has other arguments."""
    schema, function = vendor.ROW_UPDATES[0]
    other = schema.replace("int unused_", "int unused_, Tensor B_offsets")
    with registered((other, function)):
        reason = LOOKUP.supports(lookup("sgd"))
    assert reason is not None
    assert reason.endswith("wants an argument 'B_offsets' as well: another release of fbgemm_ascend")


# --- jagged


@pytest.fixture
def fbgemm_ascend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package counts as loaded, and its operators are there."""
    monkeypatch.setattr(jagged_vendor, "vendor_package_problems", dict)
    with registered(*vendor.JAGGED):
        yield


@pytest.mark.parametrize("dtype", [*vendor.JAGGED_DTYPES, torch.float64, torch.bool])
@pytest.mark.parametrize("lengths", [(3, 0, 1), (0,), (), (5,)])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_jagged_conversions_are_the_same_with_and_without(
    dtype: torch.dtype, lengths: tuple[int, ...], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = torch.tensor(lengths, dtype=torch.int64)
    values = (normal(generator(2), sum(lengths), *shape) * 9).to(dtype)
    plain = jagged_to_padded(values, lengths_to_offsets(counts), 4, 1), lengths_to_offsets(counts)
    assert not jagged_vendor.takes_lengths(counts)
    monkeypatch.setattr(jagged_vendor, "vendor_package_problems", dict)
    with registered(*vendor.JAGGED):
        offsets = lengths_to_offsets(counts)
        padded = jagged_to_padded(values, offsets, 4, 1)
        assert torch.equal(offsets, plain[1])
        assert torch.equal(padded, plain[0])  # a sequence of 5 is cut
        assert padded.dtype == dtype
        fitting = jagged_to_padded(values, offsets, 5)
        assert torch.equal(padded_to_jagged(fitting, offsets), values)


@pytest.mark.usefixtures("fbgemm_ascend")
def test_which_tensors_go_through_the_package() -> None:
    values, offsets = torch.zeros(3, 2), torch.tensor([0, 3])
    padded = torch.zeros(1, 3, 2)
    assert jagged_vendor.takes_lengths(torch.tensor([1, 2]))
    assert jagged_vendor.takes_values(values, offsets)
    assert jagged_vendor.takes_padded(padded, offsets)
    for refused in (values.double(), values.clone().requires_grad_(), values[:0], values[:, :0]):
        assert not jagged_vendor.takes_values(refused, offsets)
    assert not jagged_vendor.takes_padded(padded.double(), offsets)
    assert not jagged_vendor.takes_lengths(torch.tensor([1, 2], dtype=torch.int32))


@pytest.mark.usefixtures("fbgemm_ascend")
def test_torch_compile_traces_the_plain_conversions() -> None:
    def convert(lengths: Tensor, values: Tensor) -> Tensor:
        return jagged_to_padded(values, lengths_to_offsets(lengths), 4)

    torch._dynamo.reset()
    compiled = torch.compile(convert, fullgraph=True, backend="aot_eager")
    lengths, values = torch.tensor([2, 1]), normal(generator(5), 3, 2)
    assert torch.equal(compiled(lengths, values), convert(lengths, values))


@pytest.mark.usefixtures("fbgemm_ascend")
def test_gradients_still_flow_through_jagged_conversions() -> None:
    offsets = torch.tensor([0, 2, 3])
    values = torch.ones(3, 2, requires_grad=True)
    padded_to_jagged(jagged_to_padded(values, offsets, 2) * 3.0, offsets).sum().backward()
    assert torch.equal(values.grad, torch.full((3, 2), 3.0))  # type: ignore[arg-type]
    out, pull_back = torch.func.vjp(lambda x: jagged_to_padded(x, offsets, 2), values.detach())
    assert torch.equal(pull_back(torch.ones_like(out))[0], torch.ones(3, 2))
