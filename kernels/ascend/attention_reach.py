"""How far back each time bucket reaches from each query: what makes the gradient of the time table cheap."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.kernels.triton.attention_call import Attention

FARTHER_THAN_ANY = 1 << 34  # seconds between sequences: more than twice what int32 differences span


def reach_of(call: Attention) -> Tensor | None:
    """`[T, buckets]` int32: of the sequence's keys, how many lie `edges[b]` seconds or more before the query, b >= 1.

    None where the keys that a query sees need not be sorted, all of them before it: without a time bias, with
    contextual tokens or without the causal mask, or with times out of order (the host waits for the device to know).
    """
    if call.time is None or not call.causal or call.context:
        return None
    assert call.query_seconds is not None
    assert call.key_seconds is not None
    sequences = torch.arange(call.offsets.shape[0] - 1, device=call.offsets.device)
    sequence = torch.repeat_interleave(sequences, call.offsets.diff(), output_size=call.q.shape[0])
    queries, keys = (x + sequence * FARTHER_THAN_ANY for x in (call.query_seconds, call.key_seconds))
    if not bool((keys.diff() >= 0).all() & (queries >= keys).all()):
        return None
    farthest = queries.unsqueeze(1) - call.edges[1:-1]
    before = torch.searchsorted(keys, farthest, right=True) - call.offsets[sequence].unsqueeze(1)
    return before.clamp_min(0).to(torch.int32)
