"""Stand-ins for Ascend's fused attention operators: their schemas on the CPU, computing the documented formula.

What the real operator refuses, or is not documented to take, raises `Refused`: an adapter must not let it through.
Stand-ins of the other operators are in vendor_standins_small.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library


class Refused(RuntimeError):
    """The operator would not have taken this call."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


StandIn = tuple[str, Callable[..., Any]]  # "namespace::schema", function


@contextmanager
def registered(*stand_ins: StandIn) -> Iterator[None]:
    """The operators are there, with CPU kernels, until the block ends."""
    libraries: dict[str, Library] = {}
    try:
        for schema, function in stand_ins:
            namespace, _, definition = schema.partition("::")
            library = libraries.setdefault(namespace, Library(namespace, "FRAGMENT"))
            library.define(definition)
            library.impl(definition.partition("(")[0], function, "CPU")
        yield
    finally:
        for library in libraries.values():
            library._destroy()


def hstu_mask(length: int, context: int, targets: int, group: int, causal: bool) -> Tensor:
    """`[length, length]`, point by point as documented: 1 where the row sees the column."""
    mask = torch.ones(length, length)
    history = length - targets
    for row in range(length):
        for column in range(length):
            if row < context and column < history:
                continue
            hidden = causal and column > row
            if group > 0 and row >= history and history <= column < history + (row - history) // group * group:
                hidden = True
            mask[row, column] = 0.0 if hidden else 1.0
    return mask


def hstu_scores(q: Tensor, k: Tensor, mask: Tensor, alpha: float, scale: float) -> tuple[Tensor, Tensor]:
    """SiLU attention of one sequence, q, k `[n, H, D]`: (attention `[H, n, n]`, its derivative by q k^T)."""
    x = torch.einsum("ihd,jhd->hij", q, k) * alpha
    gate = torch.sigmoid(x)
    return x * gate * scale * mask, gate * (1.0 + x * (1.0 - gate)) * alpha * scale * mask


def hstu_sequence(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alpha: float, scale: float) -> Tensor:
    dtype = q.dtype
    q, k, v = q.double(), k.double(), v.double()
    return torch.einsum("hij,jhd->ihd", hstu_scores(q, k, mask, alpha, scale)[0], v).to(dtype)


def hstu_sequence_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alpha: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    grad, q, k, v = grad.double(), q.double(), k.double(), v.double()
    attention, slope = hstu_scores(q, k, mask, alpha, scale)
    d_scores = torch.einsum("ihd,jhd->hij", grad, v) * slope
    dq, dk = torch.einsum("hij,jhd->ihd", d_scores, k), torch.einsum("hij,ihd->jhd", d_scores, q)
    return dq.to(dtype), dk.to(dtype), torch.einsum("hij,ihd->jhd", attention, grad).to(dtype)


def check_hstu(q: Tensor, k: Tensor, v: Tensor, batch: int, length: int, widest: int, dtypes: tuple[Any, ...]) -> None:
    require(1 <= batch <= 2048, "batch")
    require(1 <= length <= 20480, "length")
    require(1 <= q.shape[-2] <= 16, "heads")
    require(16 <= q.shape[-1] <= widest and q.shape[-1] % 16 == 0, "head width")
    require(q.shape == k.shape == v.shape, "shapes")
    require(q.dtype in dtypes and q.dtype == k.dtype == v.dtype, "dtype")


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _jagged_masks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None, mask_type: int, max_seq_len: int,
    seq_offset: Tensor, num_context: Tensor | None, num_target: Tensor | None, target_group_size: int | None,
) -> list[tuple[slice, Tensor]]:  # fmt: skip
    """The checks of hstu_jagged; for each sequence its rows and its mask."""
    require(mask is None and attn_bias is None, "stands in without mask and bias")
    require(mask_type in (0, 2), "mask_type")
    require(seq_offset.dtype in (torch.int32, torch.int64), "offset dtype")
    batch = seq_offset.numel() - 1
    check_hstu(q, k, v, batch, max_seq_len, 512, FLOATS)
    require((num_context is None) == (num_target is None), "num_context and num_target go together")
    if num_context is not None:
        require(mask_type == 0, "context and targets are of the causal mask")
        require(target_group_size in (1, 3), "target_group_size")
    bounds = seq_offset.tolist()
    contexts = [0] * batch if num_context is None else num_context.tolist()
    targets = [0] * batch if num_target is None else num_target.tolist()
    masks = []
    for start, end, context, target in zip(bounds[:-1], bounds[1:], contexts, targets, strict=True):
        require(1 <= end - start <= max_seq_len, "sequence length")
        require(context <= 128 and target <= 512 and context + target < max_seq_len + (num_context is None), "counts")
        masks.append(
            (slice(start, end), hstu_mask(end - start, context, target, target_group_size or 0, not mask_type))
        )
    return masks


def _scale(silu_scale: float, max_seq_len: int) -> float:
    return silu_scale or 1.0 / max_seq_len


_JAGGED = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? attn_bias=None, int mask_type=0, int max_seq_len=0, "
    "float silu_scale=0.0, Tensor seq_offset=None, Tensor? num_context=None, Tensor? num_target=None, "
    "int? target_group_size=0, float? alpha=1.0"
)


def _hstu_jagged(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None, mask_type: int = 0,
    max_seq_len: int = 0, silu_scale: float = 0.0, seq_offset: Any = None, num_context: Tensor | None = None,
    num_target: Tensor | None = None, target_group_size: int | None = 0, alpha: float | None = 1.0,
    deterministic: bool = False,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(v)
    for rows, seen in _jagged_masks(
        q, k, v, mask, attn_bias, mask_type, max_seq_len, seq_offset, num_context, num_target, target_group_size
    ):
        scale = _scale(silu_scale, max_seq_len)
        out[rows] = hstu_sequence(q[rows], k[rows], v[rows], seen, 1.0 if alpha is None else alpha, scale)
    return out


def _hstu_jagged_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None,
    mask_type: int = 0, max_seq_len: int = 0, silu_scale: float = 0.0, seq_offset: Any = None,
    num_context: Tensor | None = None, num_target: Tensor | None = None, target_group_size: int | None = 0,
    alpha: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    require(grad.shape == v.shape and grad.dtype == v.dtype, "grad")
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, seen in _jagged_masks(
        q, k, v, mask, attn_bias, mask_type, max_seq_len, seq_offset, num_context, num_target, target_group_size
    ):
        scale, factor = _scale(silu_scale, max_seq_len), 1.0 if alpha is None else alpha
        found = hstu_sequence_backward(grad[rows], q[rows], k[rows], v[rows], seen, factor, scale)
        for whole, part in zip(grads, found, strict=True):
            whole[rows] = part
    return *grads, None


HSTU_JAGGED: list[StandIn] = [
    (f"mxrec::hstu_jagged.equal({_JAGGED}, bool deterministic=False) -> Tensor", _hstu_jagged),
    (
        f"mxrec::hstu_jagged_backward.equal(Tensor grad, {_JAGGED}) -> (Tensor, Tensor, Tensor, Tensor)",
        _hstu_jagged_backward,
    ),
]


def _hstu_forward_v2(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rab: Tensor | None, mask_type: int, max_seq_len: int,
    max_seq_len_k: int | None, silu_scale: float | None, seq_offset: Tensor, seq_offset_k: Tensor | None,
    num_context: Tensor | None, num_target: Tensor | None, target_group_size: int | None, alpha: float | None,
    metadata: Tensor | None = None,
) -> Tensor:  # fmt: skip
    require(mask is None and rab is None and num_context is None and num_target is None, "full attention alone")
    check_hstu(q, k, v, seq_offset.numel() - 1, max_seq_len, 256, FLOATS[1:])
    require(seq_offset.dtype == torch.int32, "offset dtype")
    out, bounds = torch.empty_like(v), seq_offset.tolist()
    for start, end in itertools.pairwise(bounds):
        rows, seen = slice(start, end), torch.ones(end - start, end - start)  # mask_type goes nowhere
        scale = _scale(silu_scale or 0.0, max_seq_len)
        out[rows] = hstu_sequence(q[rows], k[rows], v[rows], seen, 1.0 if alpha is None else alpha, scale)
    return out


def _hstu_backward_v2(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, max_seqlen_k: int, seq_offset_q: Tensor,
    seq_offset_k: Tensor, rab: Tensor | None = None, num_context: Tensor | None = None,
    num_target: Tensor | None = None, scale: float | None = 0.0, target_group_size: int | None = 0,
    alpha: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    require(rab is None and num_context is None and num_target is None, "full attention alone")
    check_hstu(q, k, v, seq_offset_q.numel() - 1, max_seqlen_q, 256, FLOATS[1:])
    require(seq_offset_q.dtype == seq_offset_k.dtype == torch.int32, "offset dtype")
    grads, bounds = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)), seq_offset_q.tolist()
    for start, end in itertools.pairwise(bounds):
        rows, seen = slice(start, end), torch.ones(end - start, end - start)
        assert scale is not None
        assert alpha is not None
        found = hstu_sequence_backward(grad[rows], q[rows], k[rows], v[rows], seen, alpha, scale)
        for whole, part in zip(grads, found, strict=True):
            whole[rows] = part
    return *grads, None


HSTU_V2: list[StandIn] = [
    (
        "mxrec::hstu_forward_v2(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rab, int mask_type, "
        "int max_seq_len, int? max_seq_len_k, float? silu_scale, Tensor seq_offset, Tensor? seq_offset_k, "
        "Tensor? num_context, Tensor? num_target, int? target_group_size, float? alpha, Tensor? metadata=None) "
        "-> Tensor",
        _hstu_forward_v2,
    ),
    (
        "mxrec::hstu_backward_v2(Tensor grad, Tensor q, Tensor k, Tensor v, int max_seqlen_q, int max_seqlen_k, "
        "Tensor seq_offset_q, Tensor seq_offset_k, Tensor? rab=None, Tensor? num_context=None, "
        "Tensor? num_target=None, float? scale=0.0, int? target_group_size=0, float? alpha=1.0) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _hstu_backward_v2,
    ),
]


def _check_dense(q: Tensor, k: Tensor, v: Tensor, mask_type: int, max_seq_len: int) -> Tensor:
    require(q.dim() == 4, "4D")
    require(mask_type in (0, 2), "mask_type")
    require(q.shape[1] == max_seq_len, "sequence length")
    check_hstu(q, k, v, q.shape[0], max_seq_len, 512, FLOATS)
    return hstu_mask(max_seq_len, 0, 0, 0, not mask_type)


def _hstu_dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None, mask_type: int = 0,
    max_seq_len: int = 0, silu_scale: float = 0.0,
) -> Tensor:  # fmt: skip
    seen, scale = _check_dense(q, k, v, mask_type, max_seq_len), _scale(silu_scale, max_seq_len)
    return torch.stack([hstu_sequence(*x, seen, 1.0, scale) for x in zip(q, k, v, strict=True)])


def _hstu_dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None, mask_type: int = 0,
    max_seq_len: int = 0, silu_scale: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    require(grad.shape == q.shape and grad.dtype == q.dtype, "grad")
    seen, scale = _check_dense(q, k, v, mask_type, max_seq_len), _scale(silu_scale, max_seq_len)
    found = [hstu_sequence_backward(*x, seen, 1.0, scale) for x in zip(grad, q, k, v, strict=True)]
    dq, dk, dv = (torch.stack(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv, q.new_zeros(1)


_DENSE_TAIL = "int mask_type=0, int max_seq_len=0, float silu_scale=0.0"
HSTU_DENSE: list[StandIn] = [
    (
        "mxrec::hstu_dense(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? attn_bias=None, "
        f"{_DENSE_TAIL}) -> Tensor",
        _hstu_dense,
    ),
    (
        "mxrec::hstu_dense_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? attn_bias, "
        f"{_DENSE_TAIL}) -> (Tensor, Tensor, Tensor, Tensor)",
        _hstu_dense_backward,
    ),
]
