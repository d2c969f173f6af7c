"""Sparse optimisers that update the rows of a table in the backward pass of a lookup."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from npu_rec.ops.checks import check_constants

RowOptimizerName = Literal["sgd", "rowwise_adagrad", "rowwise_adam"]


@dataclass(eq=False)
class RowOptimizer:
    """Updates the rows that a lookup touched; g is the sum of the gradients of a row's occurrences.

        sgd               w -= lr g
        rowwise_adagrad   s += mean(g^2);  w -= lr g / (sqrt(s) + eps)
        rowwise_adam      m = b1 m + (1 - b1) g;  s = b2 s + (1 - b2) mean(g^2)
                          w -= lr (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)

    t counts the updates of the table (FBGEMM's EXACT_ROWWISE_ADAGRAD and PARTIAL_ROWWISE_ADAM). Rows that were not
    looked up, and those whose g is not finite, stay as they are, moments included; there is no weight decay. `lr` may
    change between steps. One RowOptimizer is for one table: its state is as long.

    Attributes:
        lr: 0 or more (the end of a schedule may be 0).
        betas: b1 and b2, in [0, 1).
        eps: 0 or more.
        max_norm: where a row's g is longer, it is scaled to this length first; None: never.
        square: `[V]` float32 (float64 for a float64 table), s; None for sgd.
        momentum: `[V, D]` alike, m; None but for rowwise_adam.
        step: updates so far.

    Raises:
        ValueError: a value out of its range.
    """

    name: RowOptimizerName
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_norm: float | None = None
    square: Tensor | None = field(default=None, repr=False)
    momentum: Tensor | None = field(default=None, repr=False)
    step: int = 0

    def __post_init__(self) -> None:
        _check_values(self)

    def prepare(self, table: Tensor) -> None:
        """Make the state of `table [V, D]`, zeros, where it is missing."""
        if self.square is None and self.name != "sgd":
            self.square = torch.zeros(table.shape[0], dtype=_state_dtype(table), device=table.device)
        if self.momentum is None and self.name == "rowwise_adam":
            self.momentum = torch.zeros(table.shape, dtype=_state_dtype(table), device=table.device)

    def check(self, table: Tensor) -> None:
        """Raise ValueError when the state, where there is one, is not that of `table [V, D]`."""
        _check_state(table, self.square, self.momentum)


@dataclass(frozen=True)
class RowUpdate:
    """One update as backends receive it: a `RowOptimizer` at its step `t`, from 1."""

    name: RowOptimizerName
    lr: float
    betas: tuple[float, float]
    eps: float
    max_norm: float | None
    step: int
    square: Tensor | None
    momentum: Tensor | None

    def check(self, table: Tensor) -> None:
        """Raise ValueError when a value is out of its range, or the state missing or not that of `table [V, D]`.

        Values are looked at again, for those of a `RowOptimizer` may change between steps.
        """
        _check_values(self)
        if self.step < 1:
            raise ValueError(f"an update is number 1 or more, got {self.step}")
        if (self.square is None and self.name != "sgd") or (self.momentum is None and self.name == "rowwise_adam"):
            raise ValueError(f"an update by {self.name} needs the state that RowOptimizer.prepare makes")
        _check_state(table, self.square, self.momentum)

    @property
    def corrections(self) -> tuple[float, float]:
        """`(1 - b1^t, 1 - b2^t)`."""
        return 1.0 - self.betas[0] ** self.step, 1.0 - self.betas[1] ** self.step


def _state_dtype(table: Tensor) -> torch.dtype:
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def _check_values(values: RowOptimizer | RowUpdate) -> None:
    known = get_args(RowOptimizerName)
    if values.name not in known:
        raise ValueError(f"unknown row optimizer {values.name!r}; known: {', '.join(known)}")
    check_constants(lr=(values.lr, float), eps=(values.eps, float), step=(values.step, int))
    if not 0.0 <= values.lr < math.inf:
        raise ValueError(f"lr of a row optimizer must be a finite number, 0 or more, got {values.lr}")
    if not 0.0 <= values.eps < math.inf:
        raise ValueError(f"eps of a row optimizer must be a finite number, 0 or more, got {values.eps}")
    if not isinstance(values.betas, (tuple, list)) or len(values.betas) != 2:
        raise ValueError(f"betas of a row optimizer must be two numbers, got {values.betas}")
    check_constants(b1=(values.betas[0], float), b2=(values.betas[1], float))
    if not all(0.0 <= beta < 1.0 for beta in values.betas):
        raise ValueError(f"betas of a row optimizer must be in [0, 1), got {values.betas}")
    if values.max_norm is not None:
        check_constants(max_norm=(values.max_norm, float))
        if not values.max_norm > 0.0:
            raise ValueError(f"max_norm of a row optimizer must be positive or None, got {values.max_norm}")
    if values.step < 0:
        raise ValueError(f"step of a row optimizer must be 0 or more, got {values.step}")


def _check_state(table: Tensor, square: Tensor | None, momentum: Tensor | None) -> None:
    dtype, device = _state_dtype(table), table.device
    for name, state, shape in (("square", square, table.shape[:1]), ("momentum", momentum, table.shape)):
        if state is None:
            continue
        fits = state.shape == shape and state.dtype == dtype and state.device == device
        if not fits or not state.is_contiguous():
            given = f"{list(state.shape)} {state.dtype} on {state.device}"
            raise ValueError(
                f"{name} of the row optimizer must be contiguous, {list(shape)} {dtype} on {device}, for this table; "
                f"got {given}{'' if state.is_contiguous() else ', not contiguous'}; each table needs its own optimizer"
            )
