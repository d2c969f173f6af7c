"""HSTU attention of tokens whose sequences are spread over ranks (`npu_rec.distributed.context`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_rec.distributed.context import ContextShard
from npu_rec.ops import RelativeBias, hstu_attention


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: ContextShard,
    *,
    max_seq_len: int,
    alpha: float = 1.0,
    divisor: float | None = None,
    num_targets: Tensor | None = None,
    max_attn_len: int = 0,
    bias: RelativeBias | None = None,
    backend: str = "auto",
) -> Tensor:
    """The rows that `hstu_attention` of the whole sequences has for the tokens here; all ranks call it together.

    Keys and values are sent twice, in the forward and in the backward pass, so that between them a rank keeps its own
    tokens alone. Gradients of the bias tables are this rank's part: their sum over the ranks is the whole.

    Args:
        q, k: `[Tr, H, Dqk]`, this rank's tokens.
        v: `[Tr, H, Dv]`.
        shard: which tokens these are.
        num_targets: `[B]` int64, of the whole sequences.
        bias: with times, query_time is `[Tr]` and key_time is `shard.key_times`.

    Everything else is as in `hstu_attention`. Attention is causal, without contextual tokens and without
    min_full_attn_seq_len: a chunk is given the tokens before its end alone.

    Returns:
        `[Tr, H, Dv]`, dtype of v.
    """
    if q.shape[0] != shard.tokens.shape[0] or k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise ValueError(
            f"q, k, v must have the {shard.tokens.shape[0]} tokens of the shard, got {[len(x) for x in (q, k, v)]}"
        )
    position, time, query_time, key_time = (
        (None,) * 4 if bias is None else (bias.position_weight, bias.time_weight, bias.query_time, bias.key_time)
    )
    targets = None if num_targets is None else shard.targets_of_pieces(num_targets)
    divisor = float(max_seq_len if divisor is None else divisor)
    call = _Call(shard, query_time, key_time, targets, max_seq_len, alpha, divisor, max_attn_len, backend)
    out: Tensor = _ContextAttention.apply(q, k, v, position, time, call)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class _Call:
    """What of a call has no gradient."""

    shard: ContextShard
    query_time: Tensor | None
    key_time: Tensor | None
    num_targets: Tensor | None
    max_seq_len: int
    alpha: float
    divisor: float
    max_attn_len: int
    backend: str

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[K, H, Dqk]` and values `[K, H, Dv]`, in one exchange."""
        widths = [k.shape[1] * k.shape[2], v.shape[1] * v.shape[2]]
        rows = self.shard.gather(torch.cat([k.flatten(1), v.flatten(1)], 1), "context parallel: keys and values")
        keys, values = rows.split(widths, dim=1)
        return keys.unflatten(1, k.shape[1:]), values.unflatten(1, v.shape[1:])

    def scatter(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `gather`'s results -> those of k and v."""
        widths = [dk.shape[1] * dk.shape[2], dv.shape[1] * dv.shape[2]]
        rows = torch.cat([dk.flatten(1), dv.flatten(1)], 1)
        own_dk, own_dv = self.shard.scatter_add(rows, "context parallel: gradients of keys and values").split(widths, 1)
        return own_dk.unflatten(1, dk.shape[1:]), own_dv.unflatten(1, dv.shape[1:])


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time)
        ctx.call = call
        keys, values = call.gather(k, v)
        return hstu_attention(
            q,
            keys,
            values,
            call.shard.key_offsets,
            max_seq_len=call.max_seq_len,
            alpha=call.alpha,
            divisor=call.divisor,
            num_targets=call.num_targets,
            max_attn_len=call.max_attn_len,
            bias=None if position is None else RelativeBias(position, time, call.query_time, call.key_time),
            query_offsets=call.shard.query_offsets,
            backend=call.backend,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time = ctx.saved_tensors
        call: _Call = ctx.call
        keys, values = call.gather(k, v)
        dq, d_keys, d_values, d_position, d_time = torch.ops.npu_rec.hstu_attention_backward(
            grad, q, keys, values, call.shard.key_offsets, call.num_targets, position, time, call.query_time,
            call.key_time, call.max_seq_len, call.alpha, call.divisor, True, 0, call.max_attn_len, 0, call.backend,
            call.shard.query_offsets,
        )  # fmt: skip
        dk, dv = call.scatter(d_keys, d_values)
        return dq, dk, dv, None if position is None else d_position, None if time is None else d_time, None
