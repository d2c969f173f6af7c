"""`embedding_lookup`: every backend against a product with one-hot rows, and its row optimisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

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
    normal,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
    unsupported_rejected,
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import RowOptimizer, embedding_lookup
from npu_rec.ops.row_optimizer import RowOptimizerName
from npu_rec.ops.triton_support import INTERPRETED

ALL = backends("embedding_lookup")


def table_of(rows: int, width: int, seed: int, place: Place) -> dict[str, Tensor]:
    return {"table": normal(generator(seed), rows, width).to(place.device, place.dtype)}


def lookup(ids: Tensor, backend: str) -> Callable[..., Tensor]:
    return lambda table: embedding_lookup(table, ids, backend=backend)


def place_for(backend: str) -> Place:
    def probe(device: str, dtype: torch.dtype) -> None:
        place = Place(device, dtype)
        ids = torch.tensor([0, 2, 2], device=device)
        forward_and_gradients(lookup(ids, backend), table_of(4, 2, 0, place), 0)

    return place_of(probe)


@pytest.mark.parametrize("backend", ALL)
def test_rows_and_gradients_equal_the_product_with_one_hot_rows(backend: str) -> None:
    place = place_for(backend)

    @examples(60)
    @given(
        rows=st.integers(1, 40),
        width=st.integers(1, 70),
        tokens=st.sampled_from([0, 1]) | st.integers(0, 100),
        seed=st.integers(0, 2**16),
    )
    def check(rows: int, width: int, tokens: int, seed: int) -> None:
        ids = torch.randint(rows, (tokens,), generator=generator(seed))  # with many repeats
        one_hot = torch.zeros(tokens, rows, dtype=torch.float64)
        one_hot[torch.arange(tokens), ids] = 1.0
        exact = table_of(rows, width, seed, Place("cpu", torch.float64))
        with unsupported_rejected():
            table = table_of(rows, width, seed, place)
            actual = forward_and_gradients(lookup(ids.to(place.device), backend), table, seed)
        expected = forward_and_gradients(lambda table: one_hot @ table, exact, seed)
        assert_all_close(actual, expected, place.tolerance)
        assert torch.equal(actual["out"], expected["out"])

    check()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_ids_give_no_rows_and_a_zero_gradient(backend: str, rows: int) -> None:
    place = place_for(backend)
    ids = torch.zeros(0, dtype=torch.int64, device=place.device)
    results = forward_and_gradients(lookup(ids, backend), table_of(rows, 3, 0, place), 0)
    assert results["out"].shape == (0, 3)
    assert torch.equal(results["table"], torch.zeros(rows, 3, dtype=torch.float64))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_exact_and_dtypes_kept_in_every_precision(backend: str, dtype: torch.dtype) -> None:
    place = place_for(backend)
    table = table_of(9, 4, 0, Place(place.device, dtype))["table"].requires_grad_()
    ids = torch.tensor([8, 0, 0, 3], device=place.device)
    try:
        out = embedding_lookup(table, ids, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))
    assert torch.equal(out, table.detach()[ids])
    out.backward(torch.ones_like(out))
    assert table.grad is not None
    assert table.grad.dtype == dtype
    assert table.grad[:, 0].tolist() == [2, 0, 0, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend: str) -> None:
    place = place_for(backend)
    if place.dtype != torch.float64:
        pytest.skip("gradcheck needs float64")
    ids = torch.tensor([3, 1, 1, 0], device=place.device)
    assert torch.autograd.gradcheck(lookup(ids, backend), [table_of(4, 3, 0, place)["table"].requires_grad_()])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("ids", [[3, 1, 1, 0], [2], []])
def test_opcheck_of_the_operator_and_its_backward(backend: str, ids: list[int]) -> None:
    place = place_for(backend)
    index = torch.tensor(ids, dtype=torch.int64, device=place.device)
    table = table_of(4, 3, 0, place)["table"]
    opcheck("embedding_lookup", backend, (table.clone().requires_grad_(), index, backend))
    grad = torch.randn(len(ids), 3, dtype=place.dtype, device=place.device)
    opcheck("embedding_lookup_backward", backend, (grad, table, index, backend))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("bad", [4, -1, 2**40])
def test_an_id_outside_the_table_raises_index_error(backend: str, bad: int) -> None:
    if place_for(backend).device != "cpu":
        pytest.skip("an accelerator reports it late, and otherwise")
    with pytest.raises(IndexError, match="out of range"):
        embedding_lookup(torch.zeros(4, 3), torch.tensor([0, bad]), backend=backend)


@pytest.mark.parametrize(("table", "ids"), [((4,), (2,)), ((4, 3), (2, 2)), ((4, 3, 1), (2,))])
def test_shapes_that_do_not_fit_raise_value_error(table: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"table must be \[V, D\] and ids \[T\]"):
        embedding_lookup(torch.zeros(table), torch.zeros(ids, dtype=torch.int64))


def test_an_unknown_backend_raises_and_names_the_known_ones() -> None:
    known = known_backends("embedding_lookup")
    with pytest.raises(BackendError, match=f"embedding_lookup: no backend 'x'; known: {known}"):
        embedding_lookup(torch.zeros(2, 3), torch.tensor([0]), backend="x")


# --- row optimisers

NAMES = get_args(RowOptimizerName)
each_name = pytest.mark.parametrize("name", NAMES)


@dataclass
class Equations:
    """The equations in the docstring of `RowOptimizer`, row by row in float64."""

    name: str
    table: Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_norm: float | None = None
    updates: int = 0

    def __post_init__(self) -> None:
        self.table = self.table.cpu().double().clone()
        self.square, self.momentum = self.table.new_zeros(self.table.shape[0]), torch.zeros_like(self.table)

    def step(self, ids: Tensor, grad: Tensor, lr: float) -> None:
        self.updates += 1
        for row in set(ids.tolist()):
            g = grad.double()[ids == row].sum(0)
            if self.max_norm is not None and float(g.norm()) > self.max_norm:
                g = g * self.max_norm / g.norm()
            self.table[row] -= lr * self.direction(row, g)

    def direction(self, row: int, g: Tensor) -> Tensor:
        if self.name == "sgd":
            return g
        if self.name == "rowwise_adagrad":
            self.square[row] += (g * g).mean()
            return g / (self.square[row].sqrt() + self.eps)
        b1, b2 = self.betas
        self.momentum[row] = b1 * self.momentum[row] + (1 - b1) * g
        self.square[row] = b2 * self.square[row] + (1 - b2) * (g * g).mean()
        m, s = self.momentum[row] / (1 - b1**self.updates), self.square[row] / (1 - b2**self.updates)
        return m / (s.sqrt() + self.eps)

    def results(self) -> dict[str, Tensor]:
        """What a `RowOptimizer` of that name has, too."""
        state = {} if self.name == "sgd" else {"square": self.square}
        return {"table": self.table} | state | ({"momentum": self.momentum} if self.name == "rowwise_adam" else {})


def results_of(table: Tensor, optimizer: RowOptimizer) -> dict[str, Tensor]:
    parts = {"table": table.detach(), "square": optimizer.square, "momentum": optimizer.momentum}
    return {name: part.cpu().double() for name, part in parts.items() if part is not None}


def gradients(seed: int, *shape: int) -> Tensor:
    """On a 2^-6 grid, so that their sums are the same in every order and precision."""
    return (normal(generator(seed), *shape) * 64).round() / 64


def update(table: Tensor, ids: Tensor, grad: Tensor, optimizer: RowOptimizer, backend: str) -> None:
    out = embedding_lookup(table, ids.to(table.device), optimizer=optimizer, backend=backend)
    out.backward(grad.to(out))


def update_place(backend: str) -> Place:
    def probe(device: str, dtype: torch.dtype) -> None:
        table = table_of(4, 2, 0, Place(device, dtype))["table"].requires_grad_()
        update(table, torch.tensor([0, 2, 2]), torch.ones(3, 2), RowOptimizer("rowwise_adam", 0.1), backend)

    return place_of(probe)


@pytest.mark.parametrize("backend", ALL)
@each_name
def test_updates_equal_the_equations_in_float64(backend: str, name: RowOptimizerName) -> None:
    place = update_place(backend)

    @examples(30)
    @given(
        rows=st.integers(1, 30),
        width=st.integers(1, 70),
        steps=st.lists(st.sampled_from([0, 1]) | st.integers(0, 40), min_size=1, max_size=3),
        max_norm=st.sampled_from([None, 1e-3, 2.0, 1e9]),
        eps=st.sampled_from([1e-8, 1e-2]),
        betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
        seed=st.integers(0, 2**16),
    )
    def check(
        rows: int,
        width: int,
        steps: list[int],
        max_norm: float | None,
        eps: float,
        betas: tuple[float, float],
        seed: int,
    ) -> None:
        table = table_of(rows, width, seed, place)["table"].requires_grad_()
        before = table.detach().clone()
        expected = Equations(name, table.detach(), betas, eps, max_norm)
        optimizer = RowOptimizer(name, 0.0, betas, eps, max_norm)
        touched = torch.zeros(rows, dtype=torch.bool)
        for step, tokens in enumerate(steps):
            ids = torch.randint(rows, (tokens,), generator=generator(seed + step))  # with many repeats
            grad = gradients(seed + step, tokens, width)
            optimizer.lr = 0.1 / (step + 1)
            with unsupported_rejected():
                update(table, ids, grad, optimizer, backend)
            expected.step(ids, grad, optimizer.lr)
            touched[ids] = True
        assert optimizer.step == len(steps)
        actual = results_of(table, optimizer)
        assert_all_close(actual, expected.results(), place.tolerance)
        assert torch.equal(table.detach()[~touched], before[~touched])
        assert not any(actual[part][~touched].any() for part in actual if part != "table")

    check()


@pytest.mark.parametrize("backend", ALL)
@each_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tables_are_updated_in_float32_and_rounded_once(
    backend: str, name: RowOptimizerName, dtype: torch.dtype
) -> None:
    place = update_place(backend)
    table = table_of(9, 20, 0, Place(place.device, dtype))["table"].requires_grad_()
    expected = Equations(name, table.detach())
    optimizer = RowOptimizer(name, 0.1)
    ids, grad = torch.tensor([8, 0, 0, 3, 0]), gradients(1, 5, 20).to(dtype)
    try:
        update(table, ids, grad, optimizer, backend)
    except BackendError as error:
        pytest.skip(str(error))
    expected.step(ids, grad, 0.1)
    assert table.dtype == dtype
    actual, wanted = results_of(table, optimizer), expected.results()
    error = (actual.pop("table") - wanted.pop("table")).abs()
    cut_off = (
        backend.startswith("triton") and INTERPRETED and dtype == torch.bfloat16
    )  # Triton's interpreter does not round
    allowed = torch.finfo(dtype).eps * (1.01 if cut_off else 0.51)
    assert bool((error <= allowed * expected.table.abs() + 1e-6).all())
    assert_all_close(actual, wanted, 2e-5)


@pytest.mark.parametrize("backend", ALL)
@each_name
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_is_float32_or_float64_for_a_float64_table(
    backend: str, name: RowOptimizerName, dtype: torch.dtype
) -> None:
    table = torch.zeros(3, 2, dtype=dtype, device=update_place(backend).device, requires_grad=True)
    optimizer = RowOptimizer(name, 0.1)
    try:
        update(table, torch.tensor([1]), torch.ones(1, 2), optimizer, backend)
    except BackendError as error:
        pytest.skip(str(error))
    state = {part: x for part, x in (("square", optimizer.square), ("momentum", optimizer.momentum)) if x is not None}
    assert set(state) == {"sgd": set(), "rowwise_adagrad": {"square"}, "rowwise_adam": {"square", "momentum"}}[name]
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(x.dtype == wanted and x.shape[0] == 3 for x in state.values())


@pytest.mark.parametrize("backend", ALL)
def test_sgd_equals_dense_gradients_and_torch_sgd(backend: str) -> None:
    place = update_place(backend)
    ours = table_of(20, 33, 0, place)["table"].requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    optimizer, dense = RowOptimizer("sgd", 0.3), torch.optim.SGD([theirs], lr=0.3)
    for step in range(4):
        ids, grad = torch.randint(20, (50,), generator=generator(step)), gradients(step, 50, 33)
        update(ours, ids, grad, optimizer, backend)
        dense.zero_grad()
        torch.nn.functional.embedding(ids.to(place.device), theirs).backward(grad.to(theirs))
        dense.step()
    assert_all_close({"table": ours.detach()}, {"table": theirs.detach()}, place.tolerance)


@pytest.mark.parametrize("backend", ALL)
def test_each_lookup_is_an_update_and_the_table_gets_no_gradient(backend: str) -> None:
    place = update_place(backend)
    table = table_of(5, 4, 0, place)["table"].requires_grad_()
    optimizer = RowOptimizer("rowwise_adagrad", 0.1)
    ids = [torch.tensor(x, device=place.device) for x in ([1, 1, 2], [2, 4])]
    outs = [embedding_lookup(table, x, optimizer=optimizer, backend=backend) for x in ids]
    (outs[0].sum() + outs[1].sum()).backward()
    assert optimizer.step == 2
    assert table.grad is None
    # row 2 is in both lookups: 1 + 1; in one update of their sum it would be (1 + 1)^2
    assert optimizer.square is not None
    assert optimizer.square.tolist() == [0.0, 4.0, 2.0, 0.0, 1.0]


@pytest.mark.parametrize("backend", ALL)
def test_a_table_that_requires_no_gradient_is_not_updated(backend: str) -> None:
    place = update_place(backend)
    table = table_of(5, 4, 0, place)["table"]
    before, optimizer = table.clone(), RowOptimizer("rowwise_adagrad", 0.1)
    out = embedding_lookup(table, torch.tensor([1, 2], device=place.device), optimizer=optimizer, backend=backend)
    assert not out.requires_grad
    weight = torch.ones_like(out).requires_grad_()
    (out * weight).sum().backward()
    assert torch.equal(table, before)
    assert (optimizer.step, optimizer.square) == (0, None)


def test_an_unknown_row_optimizer_raises_and_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown row optimizer 'adam'; known: sgd, rowwise_adagrad, rowwise_adam"):
        RowOptimizer("adam", 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("bad", [4, -1])
def test_an_update_of_a_row_outside_the_table_raises_index_error(backend: str, bad: int) -> None:
    if update_place(backend).device != "cpu":
        pytest.skip("an accelerator reports it late, and otherwise")
    table, ids = torch.zeros(4, 3, requires_grad=True), torch.tensor([0, bad])
    with pytest.raises(IndexError, match="out of range"):
        embedding_lookup(table, ids, optimizer=RowOptimizer("sgd", 0.1), backend=backend)
    with pytest.raises(IndexError, match="out of range"):
        torch.ops.npu_rec.embedding_update(
            table.detach(), None, None, ids, torch.ones(2, 3), "sgd", 0.1, 0.9, 0.999, 1e-8, None, 1, backend
        )
    assert not table.any()


@pytest.mark.parametrize("backend", ALL)
@each_name
@pytest.mark.parametrize("ids", [[3, 1, 1, 0], []])
def test_opcheck_of_the_update(backend: str, name: RowOptimizerName, ids: list[int]) -> None:
    place = update_place(backend)
    table = table_of(4, 3, 0, place)["table"]
    optimizer = RowOptimizer(name, 0.1)
    optimizer.prepare(table)
    index = torch.tensor(ids, dtype=torch.int64, device=place.device)
    grad = gradients(0, len(ids), 3).to(table)
    state = (table, optimizer.square, optimizer.momentum)
    opcheck("embedding_update", backend, (*state, index, grad, name, 0.1, 0.9, 0.999, 1e-8, 1.0, 1, backend))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad", "rowwise_adam"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_leaves_its_row_alone(backend: str, name: str, bad: float) -> None:
    place = place_for(backend)
    table = table_of(5, 3, 0, place)["table"].requires_grad_()
    before = table.detach().clone()
    optimizer = RowOptimizer(name, 0.1)  # type: ignore[arg-type]
    ids = torch.tensor([1, 3, 1], device=place.device)
    grad = torch.ones(3, 3, dtype=place.dtype, device=place.device)
    grad[2, 1] = bad
    embedding_lookup(table, ids, optimizer=optimizer, backend=backend).backward(grad)
    changed = (table != before).any(1).tolist()
    assert changed == [False, False, False, True, False]
    for state in (optimizer.square, optimizer.momentum):
        assert state is None or (state.isfinite().all() and not state[1].any())
