"""`embedding_lookup`: every backend against a product with one-hot rows."""

from __future__ import annotations

from collections.abc import Callable

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
    normal,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
    unsupported_rejected,
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import embedding_lookup

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
    with pytest.raises(BackendError, match=f"embedding_lookup: no backend 'x'; known: {', '.join(['auto', *ALL])}"):
        embedding_lookup(torch.zeros(2, 3), torch.tensor([0]), backend="x")
