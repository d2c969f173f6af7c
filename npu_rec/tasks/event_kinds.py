"""What an event is besides its item: the behaviour that it is, the domain of its item."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from npu_rec.models import Layout
from npu_rec.ops.jagged import lengths_to_offsets, offsets_to_lengths, position_of_token, sequence_of_token

Reading = Literal["ignored", "added", "tokens"]
STD = 0.02


class EventKinds(nn.Module):
    """Vectors of kinds, added to the item's token, or tokens of their own behind it.

    An event with k kinds that are tokens is 1 + k tokens: item, kind, kind, ... The last one predicts the next item.
    """

    def __init__(self, sizes: Mapping[str, int], readings: Mapping[str, Reading], width: int) -> None:
        """`sizes`: of each kind the largest code and one; `readings`: how each is read, `added` or `tokens`."""
        super().__init__()
        self.added = nn.ParameterDict()
        self.tokens = nn.ParameterDict()
        for name, size in sizes.items():
            weight = nn.Parameter(torch.empty(size, width))
            nn.init.normal_(weight, std=STD)
            (self.added if readings[name] == "added" else self.tokens)[name] = weight

    @property
    def tokens_per_event(self) -> int:
        """1 + how many kinds are tokens."""
        return 1 + len(self.tokens)

    def arrange(
        self,
        items: Tensor,
        kinds: Mapping[str, Tensor],
        layout: Layout,
        keys: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, Layout, Tensor]:
        """Tokens `[L, D]`, their layout, and of each event the token that predicts, `[T]`.

        Args:
            items: `[T, D]`.
            kinds: `[T]` int64 codes of each kind.
            layout: of the events.
            keys: dropout keys of (number of the sequence in the batch `[L]`, place in it `[L]`), or None.
        """
        for name, weight in self.added.items():
            items = items + weight[kinds[name]].to(items.dtype)
        each = self.tokens_per_event
        parts = [items, *(weight[kinds[name]].to(items.dtype) for name, weight in self.tokens.items())]
        x = torch.stack(parts, 1).flatten(0, 1)
        offsets = lengths_to_offsets(each * offsets_to_lengths(layout.offsets))
        times, query_times = (
            None if each_time is None else each_time.repeat_interleave(each)
            for each_time in (layout.times, layout.query_times)
        )
        dropout_keys = None
        if keys is not None:
            dropout_keys = keys(sequence_of_token(offsets, len(x)), position_of_token(offsets, len(x)))
        places = torch.arange(len(items), device=items.device) * each + each - 1
        return x, Layout(offsets, layout.max_seq_len, times, query_times, None, dropout_keys), places
