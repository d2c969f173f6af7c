"""HSTU attention with its relative bias: what is launched, with which tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_rec.kernels.triton.attention_backward import key_kernel, query_kernel
from npu_rec.kernels.triton.attention_call import Attention
from npu_rec.kernels.triton.attention_forward import forward_kernel
from npu_rec.kernels.triton.launch import INTERPRETED
from npu_rec.kernels.triton.schedule import work_items

PARTIAL_ENTRIES = 1 << 25  # of the position gradient over all programs of a launch: 128 MiB


@dataclass(frozen=True)
class Tiles:
    """Rows of queries and keys of a tile, and warps and stages to run it with."""

    queries: int
    keys: int
    warps: int
    stages: int


def _pointers(call: Attention) -> tuple[Tensor, ...]:
    """Arguments from `num_targets` to `edges`; an absent tensor's place is taken by one that is never read."""
    at_no_distance = None if call.position is None else call.position[call.max_seq_len - 1 :]
    given = (call.num_targets, at_no_distance, call.time, call.query_seconds, call.key_seconds, call.edges)
    return tuple(call.offsets if x is None else x for x in given)


def _constants(call: Attention, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments and launch options."""
    # follows set_float32_matmul_precision and allow_tf32 too
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {
        **call.constants(),
        "PRECISION": "float32" if INTERPRETED else precision,
        "BM": tiles.queries,
        "BN": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


# (queries, keys, warps, stages) by padded width and bytes of an element: the largest that Triton's compiler places
# without spilling much on sm_90 and sm_80. Queries are a multiple of keys in "forward" (a range of keys ends where the
# diagonal begins) and equal to them in "query" (the position gradient sums diagonals).
_TILES = {
    ("forward", 64, 2): Tiles(128, 64, 8, 2),
    ("forward", 128, 2): Tiles(128, 64, 8, 2),
    ("forward", 256, 2): Tiles(64, 64, 8, 2),
    ("query", 64, 2): Tiles(64, 64, 4, 2),
    ("query", 128, 2): Tiles(64, 64, 8, 2),
    ("query", 256, 2): Tiles(32, 32, 4, 1),
    ("key", 64, 2): Tiles(64, 64, 4, 2),
    ("key", 128, 2): Tiles(64, 64, 8, 2),
    ("key", 256, 2): Tiles(32, 32, 4, 1),
    ("forward", 64, 4): Tiles(32, 32, 4, 1),
    ("forward", 128, 4): Tiles(32, 32, 8, 1),
    ("forward", 256, 4): Tiles(16, 16, 4, 1),
    ("query", 64, 4): Tiles(32, 32, 4, 1),
    ("query", 128, 4): Tiles(32, 32, 8, 1),
    ("query", 256, 4): Tiles(16, 16, 4, 1),
    ("key", 64, 4): Tiles(16, 32, 4, 1),
    ("key", 128, 4): Tiles(16, 32, 4, 1),
    ("key", 256, 4): Tiles(16, 16, 4, 1),
}


def tiles_of(kernel: str, width: int, item_bytes: int) -> Tiles:
    """Tiles of kernel "forward", "query" or "key" for heads of a padded width and elements of some bytes."""
    return _TILES[kernel, max(64, width), item_bytes]


def forward(call: Attention) -> Tensor:
    """`[T, H, Dv]`."""
    total, heads = call.q.shape[:2]
    out = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    if out.numel() == 0:
        return out
    tiles = tiles_of("forward", call.width, call.q.element_size())
    work = work_items(call.offsets, total, tiles.queries, last_first=call.causal)
    strides = (x.stride(i) for x in (call.q, call.k, call.v, out) for i in (0, 1))
    forward_kernel[(work.shape[0] * heads,)](
        call.q, call.k, call.v, out, call.offsets, work, *_pointers(call), *strides, heads, *call.numbers(),
        **_constants(call, tiles),
    )  # fmt: skip
    return out


def backward(call: Attention, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v `[T, H, D]` and, in float32, of the position and time tables (None where absent)."""
    dq, d_position, d_time = _query_gradients(call, grad)
    dk = torch.empty(call.k.shape, dtype=call.k.dtype, device=call.k.device)
    dv = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    total, heads = call.q.shape[:2]
    if total:
        tiles = tiles_of("key", call.width, call.q.element_size())
        work = work_items(call.offsets, total, tiles.keys, last_first=False)
        strides = (x.stride(i) for x in (grad, call.q, call.k, call.v, dk, dv) for i in (0, 1))
        key_kernel[(work.shape[0] * heads,)](
            grad, call.q, call.k, call.v, dk, dv, call.offsets, work, *_pointers(call), *strides, heads,
            *call.numbers(), **_constants(call, tiles),
        )  # fmt: skip
    return dq, dk, dv, d_position, d_time


def _query_gradients(call: Attention, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total, heads = call.q.shape[:2]
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    tiles = tiles_of("query", call.width, call.q.element_size())
    work = work_items(call.offsets, total, tiles.queries, last_first=call.causal) if total else None
    items = 0 if work is None else work.shape[0]
    entries = 2 * call.max_seq_len - 1
    # a launch has no more programs than there may be position gradients: each its own, so that no two race
    at_once = max(1, items if call.position is None else min(items, PARTIAL_ENTRIES // (entries * heads)))

    def partial(rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.float32, device=grad.device)

    d_position = None if call.position is None else partial(at_once * heads, entries)
    d_time = None if call.time is None else partial(items * heads, call.edges.shape[0] - 1)
    strides = [x.stride(i) for x in (grad, call.q, call.k, call.v, dq) for i in (0, 1)]
    for first in range(0, items, at_once):
        assert work is not None
        some = work[first : first + at_once]
        query_kernel[(some.shape[0] * heads,)](
            grad, call.q, call.k, call.v, dq, call.offsets, some, *_pointers(call),
            grad if d_position is None else d_position, grad if d_time is None else d_time[first * heads :], entries,
            *strides, heads, call.max_seq_len - 1, *call.numbers(), **_constants(call, tiles),
        )  # fmt: skip
    return dq, None if d_position is None else d_position.sum(0), None if d_time is None else d_time.sum(0)
