"""`sampled_softmax_loss`: every backend against the reference, the reference against `cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    interpreted,
    max_error,
    normal,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
    unsupported_rejected,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, Backend, sampled_softmax_loss, sampled_softmax_loss_chunked

ALL = backends("sampled_softmax_loss")
FAST = backends("sampled_softmax_loss", but="reference")
CPU = Place("cpu", torch.float64)


@dataclass(frozen=True)
class LossCase:
    """Everything that a call of `sampled_softmax_loss` is made of, except the numbers."""

    tokens: int = 7
    negatives: int = 5
    rows: int = 11
    width: int = 4
    temperature: float = 0.5
    log_q: bool = False
    mask_collisions: bool = True
    seed: int = 0

    def leaves(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
        seed = generator(self.seed)
        leaves = {"queries": normal(seed, self.tokens, self.width), "rows": normal(seed, self.rows, self.width)}
        return {name: normalize(leaf, dim=1).to(device, dtype) for name, leaf in leaves.items()}

    def indices(self) -> tuple[Tensor, Tensor]:
        """positives `[T]`, negatives `[T, R]`; with few rows they repeat and collide."""
        seed, high = generator(self.seed + 3), max(self.rows, 1)
        return (
            torch.randint(high, (self.tokens,), generator=seed),
            torch.randint(high, (self.tokens, self.negatives), generator=seed),
        )

    def log_probabilities(self) -> Tensor | None:
        return -3 * torch.rand(self.rows, generator=generator(self.seed + 4)) if self.log_q else None

    def call(self, backend: str, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Callable[..., Tensor]:
        """`sampled_softmax_loss` as a function of queries and rows."""
        positives, negatives = (index.to(device) for index in self.indices())
        log_q = self.log_probabilities()

        def run(queries: Tensor, rows: Tensor) -> Tensor:
            return sampled_softmax_loss(
                queries,
                rows,
                positives,
                negatives,
                temperature=self.temperature,
                log_q=None if log_q is None else log_q.to(device, dtype),
                mask_collisions=self.mask_collisions,
                backend=backend,
            )

        return run

    def run(self, backend: str, place: Place) -> dict[str, Tensor]:
        call = self.call(backend, place.device, place.dtype)
        return forward_and_gradients(call, self.leaves(place.dtype, place.device), self.seed)


@st.composite
def loss_cases(draw: st.DrawFn) -> LossCase:
    tokens = draw(st.sampled_from([0, 1, 2]) | st.integers(0, 40))
    return LossCase(
        tokens=tokens,
        negatives=draw(st.sampled_from([0, 1]) | st.integers(0, 12)),
        rows=draw(st.integers(1 if tokens else 0, 3) | st.integers(1, 100)),
        width=draw(st.integers(1, 20)),
        temperature=draw(st.sampled_from([1.0, 0.05, 3.0])),
        log_q=draw(st.booleans()),
        mask_collisions=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def place_for(backend: str) -> Place:
    return place_of(lambda device, dtype: LossCase().run(backend, Place(device, dtype)))


@contextmanager
def chunked_with(dense_ratio: int, floats_at_once: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_softmax_loss_chunked, "DENSE_RATIO", dense_ratio)
        patch.setattr(sampled_softmax_loss_chunked, "FLOATS_AT_ONCE", floats_at_once)
        yield


# --- against the reference


@pytest.mark.parametrize("backend", FAST)
def test_loss_and_gradients_equal_the_reference(backend: str) -> None:
    place = place_for(backend)

    @examples(25 if interpreted("sampled_softmax_loss", backend) else 100)
    @given(loss_cases())
    def check(case: LossCase) -> None:
        with unsupported_rejected():
            actual = case.run(backend, place)
        # gradients are differences of probabilities: what is left of 1 - 1 is exact to a rounding of 1
        assert_all_close(actual, case.run("reference", CPU), place.tolerance, floor=1 / case.temperature)

    check()


@pytest.mark.parametrize("dense_ratio", [0, 10**9], ids=["gather", "dense"])
@pytest.mark.parametrize("floats_at_once", [1, 150, 1 << 22])
def test_both_paths_of_chunked_equal_the_reference_in_chunks_of_any_size(dense_ratio: int, floats_at_once: int) -> None:
    @examples(60)
    @given(loss_cases())
    def check(case: LossCase) -> None:
        with chunked_with(dense_ratio, floats_at_once):
            actual = case.run("chunked", CPU)
        assert_all_close(actual, case.run("reference", CPU), CPU.tolerance, floor=1 / case.temperature)

    check()


@pytest.mark.parametrize("dense_ratio", [0, 10**9], ids=["gather", "dense"])
def test_the_paths_of_chunked_are_the_ones_meant(dense_ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    vectors = sampled_softmax_loss_chunked._Work.vectors
    monkeypatch.setattr(
        sampled_softmax_loss_chunked._Work,
        "vectors",
        lambda work, index: gathered.append(index) or vectors(work, index),
    )
    with chunked_with(dense_ratio, 1):
        LossCase().run("chunked", CPU)
    # a chunk a token, forward once, backward twice
    assert len(gathered) == (0 if dense_ratio else 3 * LossCase().tokens)


# --- against the definition


@examples(100)
@given(loss_cases())
def test_reference_equals_cross_entropy_of_the_logits(case: LossCase) -> None:
    positives, negatives = case.indices()
    log_q = case.log_probabilities()

    def run(queries: Tensor, rows: Tensor) -> Tensor:
        candidates = torch.cat([positives[:, None], negatives], 1)
        logits = (queries[:, None, :] * rows[candidates]).sum(2) / case.temperature
        if log_q is not None:
            logits = logits - log_q.double()[candidates]
        if case.mask_collisions:
            collides = torch.cat(
                [torch.zeros_like(positives[:, None], dtype=torch.bool), negatives == positives[:, None]], 1
            )
            logits = logits.masked_fill(collides, -1e30)
        return cross_entropy(logits, torch.zeros_like(positives), reduction="none")

    expected = forward_and_gradients(run, case.leaves(), case.seed)
    assert_all_close(case.run("reference", CPU), expected, CPU.tolerance, floor=1 / case.temperature)


@pytest.mark.parametrize("backend", ALL)
def test_every_row_a_negative_is_the_full_softmax(backend: str) -> None:
    place = place_for(backend)
    case = LossCase(rows=11)
    leaves = case.leaves(place.dtype, place.device)
    positives = case.indices()[0].to(place.device)
    everything = torch.arange(11, device=place.device).repeat(case.tokens, 1)
    loss = sampled_softmax_loss(**leaves, positives=positives, negatives=everything, temperature=0.5, backend=backend)
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    expected = cross_entropy(exact["queries"] @ exact["rows"].T / 0.5, positives, reduction="none")
    assert_all_close({"loss": loss.double()}, {"loss": expected}, place.tolerance)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("negatives", "mask_collisions", "others"),
    [([], True, 0), ([0, 0, 0], True, 0), ([0, 0, 0], False, 3), ([1, 0], True, 1), ([1, 1, 2], True, 3)],
    ids=["none", "all collide", "collisions count", "one collides", "duplicates count twice"],
)
def test_equal_logits_give_the_logarithm_of_their_number(
    backend: str, negatives: list[int], mask_collisions: bool, others: int
) -> None:
    place = place_for(backend)
    queries, rows = torch.ones(2, 3), torch.ones(4, 3)
    loss = sampled_softmax_loss(
        queries.to(place.device, place.dtype),
        rows.to(place.device, place.dtype),
        torch.tensor([0, 0], device=place.device),
        torch.tensor([negatives, negatives], dtype=torch.int64, device=place.device),
        temperature=0.05,
        mask_collisions=mask_collisions,
        backend=backend,
    )
    expected = torch.full((2,), 1.0 + others, dtype=torch.float64).log()
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=0, atol=place.tolerance)


@pytest.mark.parametrize("backend", ALL)
def test_log_q_of_uniform_sampling_changes_nothing_and_a_likely_negative_counts_less(backend: str) -> None:
    place = place_for(backend)
    case = LossCase()
    leaves = case.leaves(place.dtype, place.device)
    rest = dict(zip(("positives", "negatives"), (i.to(place.device) for i in case.indices()), strict=True))

    def loss(log_q: Tensor | None) -> Tensor:
        log_q = None if log_q is None else log_q.to(place.device, place.dtype)
        return sampled_softmax_loss(**leaves, **rest, temperature=0.5, log_q=log_q, backend=backend).cpu().double()

    assert_all_close({"loss": loss(torch.full((11,), -2.0))}, {"loss": loss(None)}, place.tolerance)
    row = int(rest["negatives"][0, 0])
    assert row != int(rest["positives"][0])
    likely = torch.full((11,), -2.0)
    likely[row] = -1.0
    assert loss(likely)[0] < loss(None)[0]


@pytest.mark.parametrize("backend", ALL)
def test_no_tokens_give_no_losses_and_zero_gradients(backend: str) -> None:
    place = place_for(backend)
    for case in (LossCase(tokens=0), LossCase(tokens=0, negatives=0), LossCase(tokens=0, rows=0)):
        results = case.run(backend, place)
        assert results["out"].shape == (0,)
        assert results["queries"].shape == (0, case.width)
        assert results["rows"].shape == (case.rows, case.width)
        assert not results["rows"].any()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rows", [11, 500])
def test_no_negatives_give_zero_losses_and_zero_gradients(backend: str, rows: int) -> None:
    results = LossCase(negatives=0, rows=rows, log_q=True).run(backend, place_for(backend))
    assert not any(result.any() for result in results.values())


@pytest.mark.parametrize("backend", ALL)
def test_rows_that_are_not_in_play_have_a_zero_gradient(backend: str) -> None:
    case = LossCase(rows=100)
    used = torch.cat([index.flatten() for index in case.indices()]).unique()
    unused = torch.ones(100, dtype=torch.bool)
    unused[used] = False
    assert not case.run(backend, place_for(backend))["rows"][unused].any()


@pytest.mark.parametrize("backend", ALL)
def test_huge_logits_give_finite_losses_and_gradients(backend: str) -> None:
    results = replace(LossCase(), temperature=1e-4).run(backend, place_for(backend))
    assert all(result.isfinite().all() for result in results.values())
    assert results["out"].max() > 1000


# --- precision


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [50, 20_000], ids=["few rows", "many rows"])
def test_low_precision_errs_at_most_twice_as_much_as_plain_pytorch(backend: str, dtype: torch.dtype, rows: int) -> None:
    device = place_for(backend).device
    tokens = 10 if interpreted("sampled_softmax_loss", backend) else 60
    case = LossCase(tokens=tokens, negatives=40, rows=rows, width=32, temperature=0.05, log_q=True)
    rounded = case.leaves(dtype)
    log_q = case.log_probabilities()
    assert log_q is not None
    exact_call = case.call("reference")
    exact = forward_and_gradients(exact_call, {n: x.double() for n, x in rounded.items()}, case.seed)
    positives, negatives = case.indices()

    def plain(queries: Tensor, rows: Tensor) -> Tensor:
        candidates = torch.cat([positives[:, None], negatives], 1)
        logits = torch.einsum("td,trd->tr", queries, rows[candidates]) / case.temperature - log_q.to(dtype)[candidates]
        hit = candidates == positives[:, None]
        hit[:, 0] = False
        return cross_entropy(logits.masked_fill(hit, float("-inf")), torch.zeros_like(positives), reduction="none")

    allowed = max_error(forward_and_gradients(plain, rounded, case.seed), exact)
    try:
        call = case.call(backend, device, torch.float32)
        actual = forward_and_gradients(call, {n: x.to(device) for n, x in rounded.items()}, case.seed)
    except BackendError as error:
        pytest.skip(str(error))
    for name, error in max_error(actual, exact).items():
        # and a few roundings of the largest: processors sum in different orders
        assert error <= 2 * allowed[name] + 4 * torch.finfo(torch.float32).eps * float(exact[name].abs().max()), name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_losses_are_float32_at_least_and_gradients_keep_their_dtype(
    backend: str, dtype: torch.dtype, out: torch.dtype
) -> None:
    device = place_for(backend).device
    leaves = {name: leaf.requires_grad_() for name, leaf in LossCase().leaves(dtype, device).items()}
    try:
        loss = LossCase().call(backend, device)(**leaves)
    except BackendError as error:
        pytest.skip(str(error))
    assert loss.dtype == out
    loss.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == dtype for leaf in leaves.values())


# --- gradients and registration by PyTorch's own checkers


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "case", [LossCase(rows=4, log_q=True), LossCase(rows=4, mask_collisions=False), LossCase(rows=400)]
)
def test_gradcheck(backend: str, case: LossCase) -> None:
    place = place_for(backend)
    if place.dtype != torch.float64:
        pytest.skip("gradcheck needs float64")
    small = replace(case, tokens=3, negatives=3, width=2)
    leaves = [leaf.requires_grad_() for leaf in small.leaves(device=place.device).values()]
    if case.rows > 100:  # too many to differentiate: the used ones
        positives, negatives = small.indices()
        used, inverse = torch.cat([positives[:, None], negatives], 1).unique(return_inverse=True)
        base = leaves[1].detach()
        picked = base[used.to(place.device)].requires_grad_()
        assert inverse.numel() == 12

        def run(queries: Tensor, some: Tensor) -> Tensor:
            return small.call(backend, place.device)(queries, base.index_put((used.to(place.device),), some))

        assert torch.autograd.gradcheck(run, (leaves[0], picked))
    else:
        assert torch.autograd.gradcheck(small.call(backend, place.device), leaves)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "case",
    [LossCase(log_q=True), LossCase(mask_collisions=False, rows=500), LossCase(negatives=0), LossCase(tokens=0)],
    ids=["log_q", "many rows", "no negatives", "no tokens"],
)
def test_opcheck_of_the_operator_and_its_backward(backend: str, case: LossCase) -> None:
    place = place_for(backend)

    def arguments(requires_grad: bool) -> tuple[Any, ...]:
        leaves = [x.requires_grad_(requires_grad) for x in case.leaves(place.dtype, place.device).values()]
        log_q = case.log_probabilities()
        rest = [None if x is None else x.to(place.device) for x in (*case.indices(), log_q)]
        return *leaves, *rest, case.temperature, case.mask_collisions, backend

    opcheck("sampled_softmax_loss", backend, arguments(True))
    tensors, constants = arguments(False)[:5], arguments(False)[5:]
    loss, logsumexp = torch.ops.npu_rec.sampled_softmax_loss(*tensors, *constants)
    opcheck("sampled_softmax_loss_backward", backend, (torch.randn_like(loss), *tensors, logsumexp, *constants))


@pytest.mark.parametrize("backend", ALL)
def test_an_input_without_gradient_does_not_disturb_the_other(backend: str) -> None:
    place = place_for(backend)
    full = LossCase().run(backend, place)
    leaves = LossCase().leaves(place.dtype, place.device)
    frozen = leaves.pop("rows")
    run = LossCase().call(backend, place.device, place.dtype)
    partial = forward_and_gradients(lambda queries: run(queries, frozen), leaves, 0)
    assert_all_close(partial, {name: full[name] for name in partial}, place.tolerance)


@pytest.mark.parametrize(  # but for the Triton kernels, which give NaN there
    "backend", [name for name in backends("sampled_softmax_loss") if not name.startswith("triton")]
)
def test_an_item_that_is_never_drawn_but_among_the_negatives_gives_what_the_reference_gives(backend: str) -> None:
    """log_q of -inf: an infinite loss for its tokens, NaN gradients for them and for that row, and nothing else."""
    positives, negatives = torch.tensor([0, 1, 2, 4]), torch.tensor([[1, 4], [2, 0], [0, 2], [3, 1]])
    log_q = torch.tensor([0.3, -1.0, -torch.inf, torch.inf, -0.2])
    leaves = {"queries": normal(generator(0), 4, 6), "rows": normal(generator(1), 5, 6)}

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda queries, rows: sampled_softmax_loss(
            queries, rows, positives, negatives, temperature=0.5, log_q=log_q, backend=backend
        )

    expected, actual = (forward_and_gradients(run(name), leaves, 0) for name in ("reference", backend))
    assert expected["out"].isposinf().tolist() == [False, True, False, False]
    assert expected["out"].isnan().tolist() == [False, False, True, False]
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)


# --- errors


def arguments() -> dict[str, Any]:
    return {
        "queries": torch.zeros(3, 4),
        "rows": torch.zeros(5, 4),
        "positives": torch.tensor([0, 1, 4]),
        "negatives": torch.tensor([[1, 2], [0, 4], [3, 3]]),
        "temperature": 0.05,
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"queries": torch.zeros(3, 5)}, r"queries \[T, D\] and rows \[U, D\] do not fit: \[3, 5\], \[5, 4\]"),
        ({"queries": torch.zeros(3)}, r"queries \[T, D\] and rows"),
        ({"rows": torch.zeros(2, 5, 4)}, r"queries \[T, D\] and rows"),
        ({"positives": torch.tensor([0, 1])}, r"positives must be \[T\] and negatives \[T, R\] with T = 3"),
        ({"negatives": torch.tensor([0, 1, 2])}, r"positives must be \[T\] and negatives \[T, R\] with T = 3"),
        ({"negatives": torch.tensor([[0, 1]])}, r"negatives \[T, R\] with T = 3, got \[3\], \[1, 2\]"),
        ({"log_q": torch.zeros(4)}, r"log_q must be \[U\] = \[5\], got \[4\]"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": torch.nan}, "temperature must be positive and finite, got nan"),
        ({"temperature": torch.inf}, "temperature must be positive and finite, got inf"),
        ({"rows": torch.zeros(0, 4)}, r"rows has no row \(U = 0\) for 3 tokens"),
        ({"positives": torch.tensor([0, 1, 5])}, r"positives must index rows 0..4"),
        ({"positives": torch.tensor([-1, 1, 4])}, r"positives must index rows 0..4"),
        ({"negatives": torch.tensor([[1, 2], [0, 5], [3, 3]])}, r"negatives must index rows 0..4"),
        ({"negatives": torch.tensor([[1, 2], [0, 4], [3, -1]])}, r"negatives must index rows 0..4"),
    ],
)
def test_arguments_that_do_not_fit_raise_value_error(change: dict[str, Any], text: str) -> None:
    for backend in ("auto", *ALL):
        with pytest.raises(ValueError, match=text):
            sampled_softmax_loss(**{**arguments(), **change}, backend=backend)


def test_an_unknown_backend_raises_and_names_the_known_ones() -> None:
    known = ", ".join(["auto", *ALL])
    with pytest.raises(BackendError, match=f"sampled_softmax_loss: no backend 'fast'; known: {known}"):
        sampled_softmax_loss(**arguments(), backend="fast")


def test_a_forced_backend_that_cannot_run_raises_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS["sampled_softmax_loss"]
    broken = Backend("absent", None, None, supports=lambda request: "not on a Tuesday")
    monkeypatch.setattr(operator, "backends", [broken, *operator.backends])
    with pytest.raises(BackendError, match="backend 'absent' cannot run here: not on a Tuesday"):
        sampled_softmax_loss(**arguments(), backend="absent")
    assert sampled_softmax_loss(**arguments()).shape == (3,)
