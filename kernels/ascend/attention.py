"""HSTU attention on Ascend: what is launched, with which tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from npu_rec.kernels.ascend.attention_backward import key_kernel, query_kernel
from npu_rec.kernels.ascend.attention_forward import forward_kernel
from npu_rec.kernels.ascend.attention_reach import reach_of
from npu_rec.kernels.triton.attention_call import Attention
from npu_rec.kernels.triton.launch import INTERPRETED
from npu_rec.kernels.triton.schedule import work_items

BUCKETS = 128  # of the time table, at most: the width of a tile in which its gradient is summed


@dataclass(frozen=True)
class Tiles:
    """Rows of queries and keys of a tile, and whether there is room to load the next one meanwhile."""

    queries: int
    keys: int
    multibuffer: bool = True

    @property
    def window(self) -> int:
        """Entries of the position table that a tile may need, rounded up; also what pads the table at both ends."""
        return 2 * max(self.queries, self.keys)


# By kernel and padded width: the largest that Ascend's compiler places in 192 KiB with every mask and both biases
# (`npu-rec lower`). "sorted" is "query" with sorted times, where 128 keys to 128 buckets save the vector core most.
# Queries are at most as many as keys in both (the position gradient sums diagonals).
_TILES = {
    ("forward", 64): Tiles(32, 64),
    ("forward", 128): Tiles(32, 64),
    ("forward", 256): Tiles(16, 64),
    ("query", 64): Tiles(16, 128),
    ("query", 128): Tiles(16, 128),
    ("query", 256): Tiles(16, 64),
    ("sorted", 64): Tiles(16, 128, multibuffer=False),
    ("sorted", 128): Tiles(16, 128, multibuffer=False),
    ("sorted", 256): Tiles(16, 128, multibuffer=False),
    ("key", 64): Tiles(64, 32),
    ("key", 128): Tiles(64, 32),
    ("key", 256): Tiles(64, 16, multibuffer=False),
}


def tiles_of(kernel: str, width: int) -> Tiles:
    """Tiles of kernel "forward", "query", "sorted" or "key" for heads of a padded width."""
    return _TILES[kernel, max(64, width)]


def _tables(call: Attention, tiles: Tiles) -> tuple[Tensor, ...]:
    """Arguments from `num_targets` to `key_time`; an absent tensor's place is taken by one that is never read."""
    position = None if call.position is None else pad(call.position, (tiles.window, tiles.window))
    given = (call.num_targets, position, call.time, call.query_seconds, call.key_seconds)
    return tuple(call.offsets if x is None else x for x in given)


def _numbers(call: Attention, tiles: Tiles, work: Tensor) -> tuple[float | int, ...]:
    """Arguments from `items` to `buckets`; the entry of distance 0 is `origin` in the padded position table."""
    return work.shape[0], call.q.shape[1], tiles.window + call.max_seq_len - 1, *call.numbers()


def _constants(call: Attention, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments and an option of Ascend's compiler, which the interpreter does not know."""
    return {
        **call.constants(),
        "PRECISION": "float32" if INTERPRETED else "ieee",
        "BM": tiles.queries,
        "BN": tiles.keys,
        "WINDOW": tiles.window,
        **({} if INTERPRETED else {"multibuffer": tiles.multibuffer}),
    }


def forward(call: Attention, programs: int) -> Tensor:
    """`[T, H, Dv]`."""
    total = call.q.shape[0]
    out = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    if out.numel() == 0:
        return out
    tiles = tiles_of("forward", call.width)
    work = work_items(call.offsets, total, tiles.queries, last_first=call.causal)
    strides = (x.stride(i) for x in (call.q, call.k, call.v, out) for i in (0, 1))
    forward_kernel[(programs,)](
        call.q, call.k, call.v, out, call.offsets, work, *_tables(call, tiles), *strides, *_numbers(call, tiles, work),
        **_constants(call, tiles),
    )  # fmt: skip
    return out


def backward(
    call: Attention, grad: Tensor, programs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v `[T, H, D]` and, in float32, of the position and time tables (None where absent)."""
    dq, d_position, d_time = _query_gradients(call, grad, programs)
    dk = torch.empty(call.k.shape, dtype=call.k.dtype, device=call.k.device)
    dv = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    total = call.q.shape[0]
    if total:
        tiles = tiles_of("key", call.width)
        work = work_items(call.offsets, total, tiles.keys, last_first=False)
        strides = (x.stride(i) for x in (grad, call.q, call.k, call.v, dk, dv) for i in (0, 1))
        key_kernel[(programs,)](
            grad, call.q, call.k, call.v, dk, dv, call.offsets, work, *_tables(call, tiles), *strides,
            *_numbers(call, tiles, work), **_constants(call, tiles),
        )  # fmt: skip
    return dq, dk, dv, d_position, d_time


def _query_gradients(call: Attention, grad: Tensor, programs: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total = call.q.shape[0]
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    reach = reach_of(call) if total else None
    tiles = tiles_of("query" if reach is None else "sorted", call.width)
    entries = 2 * call.max_seq_len - 1
    d_position, beyond = (
        torch.zeros(programs, width, dtype=torch.float32, device=grad.device)
        for width in (entries + 2 * tiles.window, BUCKETS)
    )
    if total:
        work = work_items(call.offsets, total, tiles.queries, last_first=call.causal)
        strides = (x.stride(i) for x in (grad, call.q, call.k, call.v, dq) for i in (0, 1))
        query_kernel[(programs,)](
            grad, call.q, call.k, call.v, dq, call.offsets, work, *_tables(call, tiles),
            call.offsets if reach is None else reach, _triangle(tiles.keys, grad.device), d_position, beyond,
            d_position.shape[1], *strides, *_numbers(call, tiles, work), BUCKETS=BUCKETS, SORTED=reach is not None,
            MERGED=_merges(call, reach), **_constants(call, tiles),
        )  # fmt: skip
    of_position = d_position.sum(0)[tiles.window : tiles.window + entries]
    return dq, None if call.position is None else of_position, _time_gradient(call, beyond.sum(0), of_position.sum())


def _merges(call: Attention, reach: Tensor | None) -> bool:
    """Whether the position gradient is summed by ids first, because tokens may share them."""
    plain = call.causal and call.num_targets is None and not call.context and not call.window
    # the compiler for the 950 cannot place a float32 tile that goes to one product and one gather
    unplaceable = call.q.dtype == torch.float32 and reach is None
    return call.position is not None and (not plain or unplaceable)


def _triangle(keys: int, device: torch.device) -> Tensor:
    """`[keys, 2 * keys]` float32: column c has ones in its first c rows."""
    return torch.ones(keys, 2 * keys, device=device).triu(1)


def _time_gradient(call: Attention, beyond: Tensor, total: Tensor) -> Tensor | None:
    """From the sums over pairs at least as far apart as buckets 1, 2, ... begin, and the sum over all pairs."""
    if call.time is None:
        return None
    sums = torch.cat([total.view(1), beyond[: call.buckets]])
    return sums - pad(sums[1:], (0, 1))
