"""Sparse optimisers that update the rows of a table in the backward pass of a lookup."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

RowOptimizerName = Literal["sgd", "rowwise_adagrad", "rowwise_adam"]


@dataclass
class RowOptimizer:
    """Updates the rows that a lookup touched; g is the sum of the gradients of a row's occurrences.

        sgd               w -= lr g
        rowwise_adagrad   s += mean(g^2);  w -= lr g / (sqrt(s) + eps)
        rowwise_adam      m = b1 m + (1 - b1) g;  s = b2 s + (1 - b2) mean(g^2)
                          w -= lr (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)

    t counts the updates of the table (FBGEMM's EXACT_ROWWISE_ADAGRAD and PARTIAL_ROWWISE_ADAM). Rows that were not
    looked up, and those whose g is not finite, stay as they are, moments included; there is no weight decay. `lr` may
    change between steps.

    Attributes:
        max_norm: where a row's g is longer, it is scaled to this length first; None: never.
        square: `[V]` float32 (float64 for a float64 table), s; None for sgd.
        momentum: `[V, D]` alike, m; None but for rowwise_adam.
        step: updates so far.
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
        if self.name not in get_args(RowOptimizerName):
            raise ValueError(f"unknown row optimizer {self.name!r}; known: {', '.join(get_args(RowOptimizerName))}")

    def prepare(self, table: Tensor) -> None:
        """Make the state of `table [V, D]`, zeros, where it is missing."""
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        if self.square is None and self.name != "sgd":
            self.square = torch.zeros(table.shape[0], dtype=dtype, device=table.device)
        if self.momentum is None and self.name == "rowwise_adam":
            self.momentum = torch.zeros(table.shape, dtype=dtype, device=table.device)


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

    @property
    def corrections(self) -> tuple[float, float]:
        """`(1 - b1^t, 1 - b2^t)`."""
        return 1.0 - self.betas[0] ** self.step, 1.0 - self.betas[1] ** self.step
