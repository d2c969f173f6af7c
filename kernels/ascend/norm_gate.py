"""`dropout(LayerNorm(x) * gate)` on Ascend: one program a vector core, which takes one block of rows after the other.

The backward pass computes mean and deviation again instead of reading what the forward pass saved. The gradients of
weight and bias are partial sums, one a program, that PyTorch adds up: no atomics, the same bits in every run.
Addresses advance by scalar int64 to a block and by int32 inside it; a mask on values compares float32, for integers
are compared one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_rec.kernels.ascend.segment_sum import block_for
from npu_rec.kernels.triton.dropout_tile import mixed
from npu_rec.kernels.triton.norm_gate_tile import gradient_of_normalise, normalise

TILE = 2048  # elements of a tile: the backward pass, with everything, fills two thirds of the memory of a vector core
FARTHEST = 2**24  # elements from one row to the next


@triton.jit
def dropout_of(low, high, begin, rows, total, channel, threshold, kept_scale):
    """Multipliers `[ROWS, BLOCK]` of `npu_rec.ops.random.dropout_scale`, bit for bit: 0 or `kept_scale`.

    `low`, `high`: the halves of the keys `[T]`, int32. The comparison of a draw with the threshold is the sign of their
    difference: -1 where the draw is below, else 0.
    """
    of_low = tl.load(low + begin + rows, mask=begin + rows < total, other=0)[:, None]
    of_high = tl.load(high + begin + rows, mask=begin + rows < total, other=0)[:, None]
    bits = mixed(mixed(channel[None, :] * -1640531527 + of_low) ^ of_high)  # 0x9E3779B9
    below = ((bits & 0x7FFFFFFF) - threshold) >> 31
    return (below + 1).to(tl.float32) * kept_scale


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    x, gate, weight, bias, low, high, out, total, stride_x, stride_gate, eps, threshold, kept_scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    within = (columns.to(tl.float32) < WIDTH)[None, :]
    if weight is not None:
        weights = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        biases = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        begin = block * ROWS
        first = begin.to(tl.int64)
        inside = (begin + rows < total)[:, None] & (columns < WIDTH)[None, :]
        at_x = x + first * stride_x + rows[:, None] * stride_x + columns[None, :]
        at_gate = gate + first * stride_gate + rows[:, None] * stride_gate + columns[None, :]
        value, _ = normalise(tl.load(at_x, mask=inside, other=0.0).to(tl.float32), within, WIDTH, eps)
        if weight is not None:
            value = value * weights
        if bias is not None:
            value = value + biases
        value = value * tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
        if low is not None:
            value = value * dropout_of(low, high, begin, rows, total, columns, threshold, kept_scale)
        at = out + first * WIDTH + rows[:, None] * WIDTH + columns[None, :]
        tl.store(at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["total"])
def backward_kernel(
    grad, x, gate, weight, bias, low, high, dx, d_gate, d_weight, d_bias,
    total, stride_grad, stride_x, stride_gate, eps, threshold, kept_scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    within = (columns.to(tl.float32) < WIDTH)[None, :]
    if weight is not None:
        weights = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        biases = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([BLOCK], dtype=tl.float32)
    bias_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        begin = block * ROWS
        first = begin.to(tl.int64)
        inside = (begin + rows < total)[:, None] & (columns < WIDTH)[None, :]
        at_grad = grad + first * stride_grad + rows[:, None] * stride_grad + columns[None, :]
        at_x = x + first * stride_x + rows[:, None] * stride_x + columns[None, :]
        at_gate = gate + first * stride_gate + rows[:, None] * stride_gate + columns[None, :]
        at = first * WIDTH
        at_out = rows[:, None] * WIDTH + columns[None, :]
        d_product = tl.load(at_grad, mask=inside, other=0.0).to(tl.float32)
        if low is not None:
            d_product = d_product * dropout_of(low, high, begin, rows, total, columns, threshold, kept_scale)
        normalised, rstd = normalise(tl.load(at_x, mask=inside, other=0.0).to(tl.float32), within, WIDTH, eps)
        value = normalised
        if weight is not None:
            value = value * weights
        if bias is not None:
            value = value + biases
        tl.store(d_gate + at + at_out, (d_product * value).to(d_gate.dtype.element_ty), mask=inside)
        d_value = d_product * tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            bias_sum += tl.sum(d_value, 0)
        if weight is not None:
            weight_sum += tl.sum(d_value * normalised, 0)
            d_value = d_value * weights
        d_x = gradient_of_normalise(d_value, normalised, rstd, WIDTH)
        tl.store(dx + at + at_out, d_x.to(dx.dtype.element_ty), mask=inside)
    partial = tl.program_id(0) * WIDTH + columns
    if weight is not None:
        tl.store(d_weight + partial, weight_sum, mask=columns < WIDTH)
    if bias is not None:
        tl.store(d_bias + partial, bias_sum, mask=columns < WIDTH)


def _shapes(width: int) -> dict[str, int]:
    """Compile-time arguments. Of one row the square root would be scalar code."""
    block = block_for(width)
    return {"WIDTH": width, "ROWS": max(TILE // block, 2), "BLOCK": block}


def _dropout(keys: Tensor | None, dropout: float) -> tuple[Tensor | None, Tensor | None, int, float]:
    """Halves `[T]` int32 of the keys (None when nothing is dropped), the threshold of the draws and the multiplier."""
    scale = 1.0 / (1.0 - dropout)
    threshold = min(round(dropout * 2**31), 2**31 - 1)
    if keys is None or dropout == 0.0:
        return None, None, threshold, scale
    return keys.to(torch.int32), (keys >> 32).to(torch.int32), threshold, scale


def _near(x: Tensor) -> Tensor:
    """`x [T, C]` with a stride of 1 along its rows, and a block of rows within the reach of int32."""
    return x if x.stride(1) == 1 and x.stride(0) < FARTHEST else x.contiguous()


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def forward(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, eps: float,
    dropout: float, programs: int,
) -> Tensor:  # fmt: skip
    """`[T, C]`, of the dtype of x; `keys [T]` int64 or None."""
    x, gate = _near(x), _near(gate)
    total, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    low, high, threshold, scale = _dropout(keys, dropout)
    if total:
        forward_kernel[(programs,)](
            x, gate, _contiguous(weight), _contiguous(bias), low, high, out, total, x.stride(0), gate.stride(0), eps,
            threshold, scale, **_shapes(width),
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None,
    eps: float, dropout: float, programs: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, gate, weight and bias, in their dtypes; None for an absent one."""
    grad, x, gate = _near(grad), _near(x), _near(gate)
    total, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    d_weight, d_bias = (
        None if parameter is None else torch.zeros(programs, width, dtype=torch.float32, device=x.device)
        for parameter in (weight, bias)
    )
    low, high, threshold, scale = _dropout(keys, dropout)
    if total:
        backward_kernel[(programs,)](
            grad, x, gate, _contiguous(weight), _contiguous(bias), low, high, dx, d_gate, d_weight, d_bias, total,
            grad.stride(0), x.stride(0), gate.stride(0), eps, threshold, scale, **_shapes(width),
        )  # fmt: skip
    return dx, d_gate, _sum(d_weight, weight), _sum(d_bias, bias)


def _sum(partial: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Of what the programs added up, in the dtype of the parameter."""
    return None if partial is None or parameter is None else partial.sum(0).to(parameter.dtype)
