"""A `RowOptimizer` with a value out of range, or the state of another table, is refused before memory is touched."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from strategies import backends, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.ops import OPERATORS, RowOptimizer, embedding_lookup

IDS = torch.tensor([0, 3, 3, 8])


each_backend = pytest.mark.parametrize("backend", ["auto", *backends("embedding_lookup")])
RUNNING = [name for name, reason in OPERATORS["embedding_lookup"].availability(IDS.device).items() if reason is None]
each_running = pytest.mark.parametrize("backend", ["auto", *RUNNING])  # those whose forward pass runs here


def table_of(rows: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(rows, 6, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"name": "adam"}, ValueError, "unknown row optimizer 'adam'; known: sgd, rowwise_adagrad, rowwise_adam"),
        ({"name": None}, ValueError, "unknown row optimizer None"),
        ({"lr": -0.1}, ValueError, "lr of a row optimizer must be a finite number, 0 or more, got -0.1"),
        ({"lr": math.nan}, ValueError, "lr of a row optimizer .* got nan"),
        ({"lr": math.inf}, ValueError, "lr of a row optimizer .* got inf"),
        ({"lr": "x"}, TypeError, "lr must be a number, got 'x'"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas of a row optimizer must be in \[0, 1\), got \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas of a row optimizer must be in \[0, 1\)"),
        ({"betas": (0.9, math.nan)}, ValueError, r"betas of a row optimizer must be in \[0, 1\)"),
        ({"betas": (0.9, 0.9, 0.9)}, ValueError, "betas of a row optimizer must be two numbers"),
        ({"betas": 0.9}, ValueError, "betas of a row optimizer must be two numbers, got 0.9"),
        ({"eps": -1.0}, ValueError, "eps of a row optimizer must be a finite number, 0 or more, got -1.0"),
        ({"eps": math.nan}, ValueError, "eps of a row optimizer .* got nan"),
        ({"max_norm": 0.0}, ValueError, "max_norm of a row optimizer must be positive or None, got 0.0"),
        ({"max_norm": math.nan}, ValueError, "max_norm of a row optimizer must be positive or None, got nan"),
        ({"step": -1}, ValueError, "step of a row optimizer must be 0 or more, got -1"),
        ({"step": 1.5}, TypeError, "step must be an integer, got 1.5"),
    ],
)
def test_values_out_of_range_are_refused_when_made(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        RowOptimizer(**{"name": "rowwise_adam", "lr": 0.1, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.0}, {"lr": 1}, {"betas": (0.0, 0.0)}, {"eps": 0.0}, {"max_norm": 2}, {"step": 7}, {"betas": [0, 0.5]}],
)
def test_values_at_the_ends_of_their_ranges_are_taken(change: dict[str, Any]) -> None:
    optimizer, table = RowOptimizer(**{"name": "rowwise_adam", "lr": 0.1, **change}), table_of()
    embedding_lookup(table, IDS, optimizer=optimizer).sum().backward()
    assert table.isfinite().all()


@each_running
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": math.nan}, "lr of a row optimizer .* got nan"),
        ({"eps": -1.0}, "eps of a row optimizer .* got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas of a row optimizer must be in"),
        ({"max_norm": -2.0}, "max_norm of a row optimizer must be positive"),
        ({"step": -1}, "an update is number 1 or more, got 0"),
    ],
)
def test_values_that_were_changed_are_looked_at_before_an_update(
    backend: str, change: dict[str, Any], text: str
) -> None:
    optimizer, table = RowOptimizer("rowwise_adam", 0.1), table_of()
    out = embedding_lookup(table, IDS, optimizer=optimizer, backend=backend)
    vars(optimizer).update(change)
    step = optimizer.step
    with pytest.raises(ValueError, match=text):
        out.sum().backward()
    assert bool((table == 1.0).all())
    assert optimizer.step == step


STATES = [
    ({"square": torch.zeros(3)}, r"square of the row optimizer must be contiguous, \[9\] torch.float32 on cpu"),
    ({"square": torch.zeros(9, 1)}, r"square .* must be .* \[9\] .* got \[9, 1\] torch.float32 on cpu"),
    ({"square": torch.zeros(9, dtype=torch.float64)}, "square .* must be .* got .* torch.float64 on cpu"),
    ({"square": torch.zeros(9, dtype=torch.bfloat16)}, "square .* must be .* got .* torch.bfloat16 on cpu"),
    ({"square": torch.zeros(18)[::2]}, r"square .* must be contiguous.* got \[9\] .*, not contiguous"),
    ({"square": torch.zeros(9, device="meta")}, "square .* on cpu, for this table; got .* on meta"),
    ({"momentum": torch.zeros(3, 6)}, r"momentum of the row optimizer must be contiguous, \[9, 6\] .* got \[3, 6\]"),
    ({"momentum": torch.zeros(1)}, r"momentum .* got \[1\]"),
    ({"momentum": torch.zeros(6, 9).T}, r"momentum .* got \[9, 6\] .*, not contiguous"),
]


@each_backend
@pytest.mark.parametrize(("state", "text"), STATES)
def test_state_that_does_not_fit_is_refused_in_the_forward_pass(
    backend: str, state: dict[str, Tensor], text: str
) -> None:
    optimizer = RowOptimizer("rowwise_adam", 0.1, **state)  # type: ignore[arg-type]
    for table in (table_of(), table_of().detach()):  # also where no backward pass would follow
        with pytest.raises(ValueError, match=text):
            embedding_lookup(table, IDS, optimizer=optimizer, backend=backend)


@each_running
@pytest.mark.parametrize(("state", "text"), STATES)
def test_state_that_does_not_fit_is_refused_before_an_update(backend: str, state: dict[str, Tensor], text: str) -> None:
    optimizer, table = RowOptimizer("rowwise_adam", 0.1), table_of()
    out = embedding_lookup(table, IDS, optimizer=optimizer, backend=backend)
    vars(optimizer).update(state)
    with pytest.raises(ValueError, match=text):
        out.sum().backward()
    assert bool((table == 1.0).all())
    assert optimizer.step == 0


@each_backend
def test_one_optimizer_does_not_serve_two_tables(backend: str) -> None:
    optimizer, other = RowOptimizer("rowwise_adagrad", 0.1), table_of(2000)
    embedding_lookup(table_of(), IDS, optimizer=optimizer, backend="reference").sum().backward()
    with pytest.raises(
        ValueError, match=r"must be contiguous, \[2000\] .* got \[9\] .* each table needs its own optimizer"
    ):
        embedding_lookup(other, IDS, optimizer=optimizer, backend=backend)
    with pytest.raises(ValueError, match=r"\[9\] torch.float64 on cpu"):
        embedding_lookup(table_of(dtype=torch.float64), IDS, optimizer=optimizer, backend=backend)


@each_backend
@pytest.mark.parametrize("name", ["rowwise_adagrad", "rowwise_adam"])
def test_an_update_without_its_state_is_refused(backend: str, name: str) -> None:
    table = table_of().detach()
    with pytest.raises(ValueError, match=f"an update by {name} needs the state that RowOptimizer.prepare makes"):
        torch.ops.npu_rec.embedding_update(
            table, None, None, IDS, torch.ones(4, 6), name, 0.1, 0.9, 0.999, 1e-8, None, 1, backend
        )
    assert bool((table == 1.0).all())


def test_optimizers_are_equal_to_themselves_alone() -> None:
    one = RowOptimizer("rowwise_adam", 0.1, square=torch.zeros(3), momentum=torch.zeros(3, 2))
    other = copy.deepcopy(one)
    assert one == one
    assert one != other
    assert len({one, other}) == 2
