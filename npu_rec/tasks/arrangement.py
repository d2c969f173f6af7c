"""From events to tokens: what a ranking model reads, in which order, and who may see whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.data.batch import LabelledBatch
from npu_rec.models import Layout
from npu_rec.models.actions import ActionEncoder
from npu_rec.ops.jagged import lengths_to_offsets, offsets_to_lengths, position_of_token, sequence_of_token


@dataclass(frozen=True)
class Arranged:
    """Tokens and what they are.

    Attributes:
        tokens: `[L, D]`.
        layout: of them.
        places: `[T]` int64, the token of each event's item.
    """

    tokens: Tensor
    layout: Layout
    places: Tensor


def arrange(
    batch: LabelledBatch,
    *,
    items: Tensor,
    actions: ActionEncoder,
    contextual: Sequence[Tensor],
    interleaved: bool,
    max_seq_len: int,
    keys: Callable[[Tensor, Tensor], Tensor] | None,
) -> Arranged:
    """Contextual tokens, the history, the candidates.

    Interleaved, an event of the history is two tokens, its item and its action, a candidate its item alone; so the
    item's token sees all before it and not its own action. Merged, an event is one token, the sum of both, and a
    candidate's action is hidden. The time bias of a history token knows the time of the next event where that cannot
    tell what is predicted: not at an item of an interleaved history.

    Args:
        items: `[T, D]`.
        contextual: `[B, D]` each, one token a sequence.
        keys: dropout keys of (row ids `[L]`, places `[L]`), or None.
    """
    total, device = batch.tokens, items.device
    sequence, slot = sequence_of_token(batch.offsets, total), position_of_token(batch.offsets, total)
    lengths = offsets_to_lengths(batch.offsets)
    histories = lengths - batch.num_targets
    is_target = slot >= histories[sequence]
    leading = len(contextual)
    each = 2 if interleaved else 1
    offsets = lengths_to_offsets(leading + each * histories + batch.num_targets)
    shift = torch.where(is_target, (each - 1) * histories[sequence] + slot, each * slot)
    places = offsets[sequence] + leading + shift
    count = leading * len(lengths) + total + ((~is_target).nonzero().shape[0] if interleaved else 0)

    x = items.new_zeros(count, items.shape[1])
    if interleaved:
        behind = ~is_target
        x = x.index_put((places,), items)
        x = x.index_put((places[behind] + 1,), actions(batch.actions[behind]).to(items.dtype))
    else:
        x = x.index_put((places,), items + actions(batch.actions, ~is_target).to(items.dtype))
    for i, vectors in enumerate(contextual):
        x = x.index_put((offsets[:-1] + i,), vectors.to(items.dtype))

    times = query_times = None
    if batch.times is not None:
        later = _next_times(batch.times, sequence, is_target)
        first = batch.times[batch.offsets[:-1].clamp_max(max(total - 1, 0))]  # of a sequence; contextual tokens have it
        times = torch.repeat_interleave(first, offsets_to_lengths(offsets), output_size=count)
        query_times = times.clone()
        times[places], query_times[places] = batch.times, batch.times if interleaved else later
        if interleaved:
            behind = ~is_target
            times[places[behind] + 1], query_times[places[behind] + 1] = batch.times[behind], later[behind]
    dropout_keys = None
    if keys is not None:
        rows = torch.repeat_interleave(batch.row_ids, offsets_to_lengths(offsets), output_size=count)
        dropout_keys = keys(rows, torch.arange(count, device=device) - offsets[sequence_of_token(offsets, count)])
    layout = Layout(
        offsets,
        max_seq_len,
        times,
        query_times,
        num_targets=batch.num_targets,
        dropout_keys=dropout_keys,
        contextual_seq_len=0 if interleaved else leading,  # what sees all of a window would tell its earlier events
    )
    return Arranged(x, layout, places)


def _next_times(times: Tensor, sequence: Tensor, is_target: Tensor) -> Tensor:
    """The time of the event after each, `[T]`; of candidates and of a sequence's last event its own."""
    later = torch.cat([times[1:], times[-1:]])
    last = torch.ones_like(is_target)
    last[:-1] = sequence[1:] != sequence[:-1]
    return torch.where(is_target | last, times, later)
