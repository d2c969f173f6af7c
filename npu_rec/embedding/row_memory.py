"""Rows in slots of the device's memory, each with what its optimiser keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from npu_rec.ops import RowOptimizer


class RowMemory(nn.Module):
    """A growing `weight [slots, D]`; a record is all of one row, on the host: `[width]` float32.

    Attributes:
        weight: on the device to which the module is moved.
        optimizer: its state is as long as `weight`; None: rows have no state.
    """

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0, dim), persistent=False)
        self.optimizer: RowOptimizer | None = None

    def use(self, optimizer: RowOptimizer) -> None:
        """Give rows the state of an optimiser, zeros."""
        self.optimizer = optimizer
        optimizer.prepare(self.weight)

    def grow(self, slots: int, limit: int | None) -> None:
        """Have `slots` at least: twice as many as before, but no more than `limit` if that is enough."""
        had = self.weight.shape[0]
        if slots <= had:
            return
        slots = max(slots, 2 * had if limit is None else min(2 * had, limit))
        self.weight = _longer(self.weight, slots)
        for name, values in self.state().items():
            setattr(self.optimizer, name, _longer(values, slots))

    def state(self) -> dict[str, Tensor]:
        """What the optimiser keeps: `square [slots]`, `momentum [slots, D]`, those that it has."""
        optimizer = self.optimizer
        state = {} if optimizer is None else {"square": optimizer.square, "momentum": optimizer.momentum}
        return {name: values for name, values in state.items() if values is not None}

    def _columns(self) -> list[Tensor]:
        return [self.weight, *(_matrix(x) for x in self.state().values())]

    @property
    def widths(self) -> list[int]:
        """Of the parts of a record."""
        return [column.shape[1] for column in self._columns()]

    def records(self, slots: Tensor) -> Tensor:
        """`[n, width]` of `slots [n]`."""
        return torch.cat([column[slots.to(column.device)].cpu() for column in self._columns()], 1)

    def place(self, slots: Tensor, records: Tensor) -> None:
        """Put `records [n, width]` into `slots [n]`."""
        if slots.shape[0] == 0:
            return
        for column, values in zip(self._columns(), records.split(self.widths, 1), strict=True):
            column[slots.to(column.device)] = values.to(column)

    def fresh(self, rows: Tensor) -> Tensor:
        """Records of `rows [n, D]` with the state at zero."""
        return torch.cat([rows, rows.new_zeros(rows.shape[0], sum(self.widths) - rows.shape[1])], 1)

    def named(self, records: Tensor) -> dict[str, Tensor]:
        """`weight [n, D]`, `square [n]` and `momentum [n, D]` of records, those that there are."""
        parts = dict(zip(("weight", *self.state()), records.split(self.widths, 1), strict=True))
        return {name: (x.squeeze(1) if name == "square" else x).contiguous() for name, x in parts.items()}

    def unnamed(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `named`; what another optimiser did not keep is zero."""
        count, state = len(parts["weight"]), self.state()
        missing = {name: torch.zeros(count, *x.shape[1:]) for name, x in state.items() if name not in parts}
        return torch.cat([_matrix({**parts, **missing}[name]) for name in ("weight", *state)], 1)


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.unsqueeze(1)


def _longer(x: Tensor, rows: int) -> Tensor:
    longer = x.new_zeros((rows, *x.shape[1:]))
    longer[: x.shape[0]] = x
    return longer
