"""Batches of packed sequences."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences of T events in all.

    Attributes:
        sequence_ids: `[B]` int64, stable ids of the sequences in the data set.
        offsets: `[B + 1]` int64.
        item_ids: `[T]` int64, what the model reads.
    """

    sequence_ids: Tensor
    offsets: Tensor
    item_ids: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.item_ids.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in given.items()})


@dataclass(frozen=True)
class JaggedBatch(Batch):
    """For every event the one after it.

    Attributes:
        next_ids: `[T]` int64, the item of the event after each; the last one of a sequence is the
            held-out item in evaluation.
        times, next_times: `[T]` int64 seconds of the same events, or None for data without times.
        actions, next_actions: `[T]` int64 of the same events, or None where the task does not ask for them.
        removed, removed_offsets: items taken out of the ranking, jagged, or None in training.
    """

    next_ids: Tensor
    times: Tensor | None = None
    next_times: Tensor | None = None
    actions: Tensor | None = None
    next_actions: Tensor | None = None
    removed: Tensor | None = None
    removed_offsets: Tensor | None = None


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Histories and, behind each, candidates.

    Attributes:
        row_ids: `[B]` int64, stable ids of the rows of the split; a sequence may have several.
        actions: `[T]` int64, also of the candidates: what is to be predicted.
        labelled: `[T]` bool, the events whose actions are predicted.
        num_targets: `[B]` int64, how many of the last events of each sequence are candidates.
        times: `[T]` int64 seconds, or None for data without times.
    """

    row_ids: Tensor
    actions: Tensor
    labelled: Tensor
    num_targets: Tensor
    times: Tensor | None = None
