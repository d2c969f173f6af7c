"""`norm_gate`: every backend against the formula, and its dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Place,
    assert_all_close,
    backends,
    examples,
    forward_and_gradients,
    generator,
    known_backends,
    max_error,
    normal,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
    unsupported_rejected,
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import norm_gate
from npu_rec.ops.random import dropout_scale, random_key

ALL = backends("norm_gate")


@dataclass(frozen=True)
class GateCase:
    """Everything that a call of `norm_gate` is made of, except the numbers."""

    tokens: int = 5
    width: int = 6
    weight: bool = False
    bias: bool = False
    eps: float = 1e-6
    dropout: float = 0.0
    keys: bool = False
    seed: int = 0

    def leaves(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
        seed = generator(self.seed)
        leaves = {"x": normal(seed, self.tokens, self.width), "gate": normal(seed, self.tokens, self.width)}
        if self.weight:
            leaves["weight"] = normal(seed, self.width)
        if self.bias:
            leaves["bias"] = normal(seed, self.width)
        return {name: leaf.to(device, dtype) for name, leaf in leaves.items()}

    def dropout_keys(self) -> Tensor | None:
        return keys_of(self.tokens, self.seed) if self.keys else None

    def call(self, backend: str, device: str = "cpu") -> Callable[..., Tensor]:
        """`norm_gate` as a function of x, gate, weight, bias."""
        keys = self.dropout_keys()
        keys = None if keys is None else keys.to(device)
        return lambda **leaves: norm_gate(
            **leaves, eps=self.eps, dropout=self.dropout, dropout_keys=keys, backend=backend
        )

    def formula(self) -> Callable[..., Tensor]:
        """The same, term by term."""
        keys = self.dropout_keys()
        drops = keys is not None and self.dropout > 0
        scale = dropout_scale(keys, self.width, self.dropout) if drops else torch.tensor(1.0)

        def run(x: Tensor, gate: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            centred = x - x.mean(1, keepdim=True)
            normalised = centred / (centred.square().mean(1, keepdim=True) + self.eps).sqrt()
            normalised = normalised if weight is None else normalised * weight
            normalised = normalised if bias is None else normalised + bias
            return normalised * gate * scale.to(x.dtype)

        return run

    def steepness(self) -> float:
        """The size of the terms that cancel in the gradient of x: nearly all of them where a row has two channels."""
        if self.tokens == 0:
            return 0.0
        leaves = self.leaves()
        rstd = (leaves["x"].var(1, correction=0, keepdim=True) + self.eps).rsqrt()
        return float((rstd * leaves["gate"] * leaves.get("weight", torch.tensor(1.0))).abs().max())

    def run(self, backend: str, place: Place) -> dict[str, Tensor]:
        leaves = self.leaves(place.dtype, place.device)
        return forward_and_gradients(self.call(backend, place.device), leaves, self.seed)

    def expected(self) -> dict[str, Tensor]:
        return forward_and_gradients(self.formula(), self.leaves(), self.seed)


def keys_of(tokens: int, seed: int = 0) -> Tensor:
    keys = random_key(seed, "dropout", torch.arange(tokens))
    assert isinstance(keys, Tensor)
    return keys


@st.composite
def gate_cases(draw: st.DrawFn) -> GateCase:
    return GateCase(
        tokens=draw(st.sampled_from([0, 1]) | st.integers(0, 70)),
        width=draw(st.integers(2, 70)),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
        dropout=draw(st.sampled_from([0.0, 0.2, 0.9])),
        keys=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def place_for(backend: str) -> Place:
    return place_of(lambda device, dtype: GateCase().run(backend, Place(device, dtype)))


# --- against the formula


@pytest.mark.parametrize("backend", ALL)
def test_forward_and_gradients_equal_the_formula(backend: str) -> None:
    place = place_for(backend)

    @examples(100)
    @given(gate_cases())
    def check(case: GateCase) -> None:
        with unsupported_rejected():
            actual = case.run(backend, place)
        expected = case.expected()
        dx = {"x": actual.pop("x")}, {"x": expected.pop("x")}
        # a width of 2 nearly divides by zero: float64 keeps nine digits there
        assert_all_close(actual, expected, 100 * place.tolerance)
        assert_all_close(*dx, 100 * place.tolerance, floor=max(case.steepness(), 1e-3))

    check()


@pytest.mark.parametrize("backend", ALL)
def test_no_tokens_give_an_empty_output_and_zero_gradients(backend: str) -> None:
    results = GateCase(tokens=0, weight=True, bias=True, dropout=0.5, keys=True).run(backend, place_for(backend))
    assert results["out"].shape == results["x"].shape == results["gate"].shape == (0, 6)
    assert results["weight"].shape == results["bias"].shape == (6,)
    assert not results["weight"].any()
    assert not results["bias"].any()


@pytest.mark.parametrize("backend", ALL)
def test_a_constant_row_gives_the_bias_times_the_gate(backend: str) -> None:
    place = place_for(backend)
    x = torch.full((2, 6), 3.0, dtype=place.dtype, device=place.device)
    gate, bias = torch.full_like(x, 2.0), torch.full_like(x[0], 0.5)
    assert torch.equal(norm_gate(x, gate, bias=bias, backend=backend), torch.ones_like(x))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_low_precision_errs_at_most_twice_as_much_as_plain_pytorch(
    backend: str, dtype: torch.dtype, affine: bool
) -> None:
    device = place_for(backend).device
    case = GateCase(tokens=64, width=50, weight=affine, bias=affine)
    rounded = case.leaves(dtype)
    exact = forward_and_gradients(case.formula(), {n: x.double() for n, x in rounded.items()}, case.seed)
    allowed = max_error(forward_and_gradients(case.formula(), rounded, case.seed), exact)
    try:
        actual = case.run(backend, Place(device, dtype))
    except BackendError as error:
        pytest.skip(str(error))
    for name, error in max_error(actual, exact).items():
        assert error <= 2 * allowed[name] + torch.finfo(dtype).eps * 0.1 * float(exact[name].abs().max()), name


@pytest.mark.parametrize("backend", ALL)
def test_low_precision_tokens_work_with_float32_parameters(backend: str) -> None:
    device = place_for(backend).device
    leaves = GateCase(weight=True, bias=True).leaves(torch.bfloat16, device)
    leaves = {n: (x if n in ("x", "gate") else x.float()).requires_grad_() for n, x in leaves.items()}
    try:
        out = GateCase().call(backend, device)(**leaves)
    except BackendError as error:
        pytest.skip(str(error))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype for x in leaves.values())
    float_gate = norm_gate(leaves["x"], leaves["gate"].float(), leaves["weight"], leaves["bias"], backend=backend)
    assert torch.equal(float_gate, out)


@pytest.mark.parametrize("backend", ALL)
def test_gradients_of_weight_and_bias_are_summed_in_float32(backend: str) -> None:
    device = place_for(backend).device
    leaves = GateCase(tokens=4096, weight=True, bias=True).leaves(torch.bfloat16)
    call, grad = GateCase().formula(), leaves["x"].double()  # not random: its products with x do not cancel
    exact = [leaf.double().requires_grad_() for leaf in leaves.values()]
    expected = torch.autograd.grad(call(*exact), exact[2:], grad)
    given = {name: leaf.to(device).requires_grad_() for name, leaf in leaves.items()}
    try:
        out = norm_gate(**given, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))
    actual = torch.autograd.grad(out, [given["weight"], given["bias"]], grad.to(out))
    for a, e in zip(actual, expected, strict=True):
        assert float((a.cpu().double() - e).abs().max()) < 0.01 * float(e.abs().max())


# --- dropout


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(backend: str, probability: float) -> None:
    place = place_for(backend)
    case = GateCase(tokens=4000, width=50, dropout=probability, keys=True)
    leaves = case.leaves(place.dtype, place.device)
    kept = replace(case, keys=False).call(backend, place.device)(**leaves)
    out = case.call(backend, place.device)(**leaves)
    dropped = out == 0
    count = out.numel()
    assert abs(int(dropped.sum()) / count - probability) < 5 * (probability * (1 - probability) / count) ** 0.5
    torch.testing.assert_close(out[~dropped], (kept / (1 - probability))[~dropped], rtol=1e-6, atol=1e-6)
    # every channel and every token drops its share too
    for dim, size in ((0, 4000), (1, 50)):
        share = dropped.double().mean(dim)
        assert float((share - probability).abs().max()) < 6 * (probability * (1 - probability) / size) ** 0.5


@pytest.mark.parametrize("backend", ALL)
def test_a_token_drops_the_same_channels_however_tokens_are_packed(backend: str) -> None:
    place = place_for(backend)
    case = GateCase(tokens=200, width=30, dropout=0.3)
    leaves = case.leaves(place.dtype, place.device)
    keys = keys_of(200).to(place.device)

    def run(rows: Tensor) -> Tensor:
        x, gate = leaves["x"][rows], leaves["gate"][rows]
        return norm_gate(x, gate, dropout=0.3, dropout_keys=keys[rows], backend=backend)

    together = run(torch.arange(200))
    shuffled = torch.randperm(200, generator=generator(1))
    assert torch.equal(run(shuffled) == 0, together[shuffled] == 0)
    assert_all_close({"out": run(shuffled)}, {"out": together[shuffled]}, place.tolerance)
    for rows in (torch.tensor([17]), torch.arange(40, 45)):
        assert_all_close({"out": run(rows)}, {"out": together[rows]}, place.tolerance)


@pytest.mark.parametrize("backend", ALL)
def test_equal_keys_drop_equal_channels_and_other_keys_others(backend: str) -> None:
    place = place_for(backend)
    ones = torch.ones(3, 200, dtype=place.dtype, device=place.device)
    keys = keys_of(2)[[0, 1, 0]].to(place.device)
    bias = torch.ones(200, dtype=place.dtype, device=place.device)
    out = norm_gate(ones, ones, bias=bias, dropout=0.5, dropout_keys=keys, backend=backend)
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("backend", ALL)
def test_gradients_are_zero_where_dropped(backend: str) -> None:
    place = place_for(backend)
    case = GateCase(tokens=30, width=20, bias=True, dropout=0.4, keys=True)
    leaves = {n: x.requires_grad_() for n, x in case.leaves(place.dtype, place.device).items()}
    out = case.call(backend, place.device)(**leaves)
    dropped = dropout_scale(keys_of(30), 20, 0.4).to(place.device) == 0
    assert torch.equal(out == 0, dropped)
    grad = torch.randn(30, 20, generator=generator(5)).to(out)
    d_gate, d_x = torch.autograd.grad(out, [leaves["gate"], leaves["x"]], grad, retain_graph=True)
    assert torch.equal(d_gate == 0, dropped)
    # what arrives at a dropped channel is of no consequence
    d_x_other, d_bias_other = torch.autograd.grad(out, [leaves["x"], leaves["bias"]], grad + 100 * dropped)
    assert torch.equal(d_x, d_x_other)
    assert torch.allclose(d_bias_other, (grad * leaves["gate"] * ~dropped / 0.6).sum(0), rtol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_without_keys_or_with_probability_zero_nothing_is_dropped(backend: str) -> None:
    place = place_for(backend)
    case = GateCase(tokens=20)
    expected = case.run(backend, place)
    for other in (replace(case, dropout=0.5), replace(case, keys=True)):
        results = other.run(backend, place)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


# --- gradients and registration by PyTorch's own checkers


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("case", [GateCase(), GateCase(weight=True, bias=True, dropout=0.3, keys=True)])
def test_gradcheck(backend: str, case: GateCase) -> None:
    place = place_for(backend)
    if place.dtype != torch.float64:
        pytest.skip("gradcheck needs float64")
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves(device=place.device).items()}
    run = case.call(backend, place.device)
    assert torch.autograd.gradcheck(lambda *given: run(**dict(zip(leaves, given, strict=True))), list(leaves.values()))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "case",
    [GateCase(), GateCase(weight=True, bias=True, dropout=0.3, keys=True), GateCase(bias=True), GateCase(tokens=0)],
    ids=["bare", "everything", "bias", "no tokens"],
)
def test_opcheck_of_the_operator_and_its_backward(backend: str, case: GateCase) -> None:
    place = place_for(backend)

    def arguments(requires_grad: bool) -> tuple[Any, ...]:
        leaves = {n: x.requires_grad_(requires_grad) for n, x in case.leaves(place.dtype, place.device).items()}
        keys = case.dropout_keys()
        tensors = [leaves.get(name) for name in ("x", "gate", "weight", "bias")]
        return *tensors, None if keys is None else keys.to(place.device), case.eps, case.dropout, backend

    opcheck("norm_gate", backend, arguments(True))
    opcheck("norm_gate_backward", backend, (torch.randn_like(arguments(False)[0]), *arguments(False)))


# --- errors


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x and gate must be \[T, C\]"),
        ({"gate": torch.zeros(3, 3)}, r"x and gate must be \[T, C\], got \[2, 3\], \[3, 3\]"),
        ({"weight": torch.zeros(2)}, r"weight must be \[C\] = \[3\], got \[2\]"),
        ({"bias": torch.zeros(1, 3)}, r"bias must be \[C\] = \[3\], got \[1, 3\]"),
        ({"eps": -1e-6}, "eps must be a finite number, 0 or more, got -1e-06"),
        ({"eps": torch.nan}, "eps must be a finite number, 0 or more, got nan"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"dropout_keys": torch.zeros(3, dtype=torch.int64)}, r"dropout_keys must be \[T\] = \[2\], got \[3\]"),
    ],
)
def test_arguments_that_do_not_fit_raise_value_error(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        norm_gate(**{"x": torch.zeros(2, 3), "gate": torch.zeros(2, 3), **change})


def test_an_unknown_backend_raises_and_names_the_known_ones() -> None:
    with pytest.raises(BackendError, match=f"norm_gate: no backend 'x'; known: {known_backends('norm_gate')}"):
        norm_gate(torch.zeros(2, 3), torch.zeros(2, 3), backend="x")
