"""`dropout(LayerNorm(x) * gate)` and its gradients.

The backward pass computes mean and deviation again instead of reading what the forward pass saved. The gradients of
weight and bias are partial sums, one a program, that PyTorch adds up: no atomics, the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_rec.kernels.triton.dropout_tile import dropout_scale
from npu_rec.kernels.triton.launch import block_of, packed, rows_of, warps_of
from npu_rec.kernels.triton.norm_gate_tile import gradient_of_normalise, normalise

PROGRAMS = 1024  # at most; each takes blocks of rows in turn
ELEMENTS_A_THREAD = 8  # of each tile: the backward pass holds up to ten tiles


@triton.jit
def dropout_of(keys, rows, columns, total, threshold, kept_scale):
    """Multipliers `[ROWS, BLOCK]`; `keys` are int32 pairs, low half first, `rows` int64 `[ROWS, 1]`."""
    low = tl.load(keys + 2 * rows, mask=rows < total, other=0)
    high = tl.load(keys + 2 * rows + 1, mask=rows < total, other=0)
    return dropout_scale(low, high, columns, threshold, kept_scale)


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    x, gate, weight, bias, keys, out, total, width, stride_x, stride_gate, eps, threshold, kept_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        weights = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    if bias is not None:
        biases = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (rows < total) & (columns < width)
        x_tile = tl.load(x + rows * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(gate + rows * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
        value, _ = normalise(x_tile, inside, width, eps)
        if weight is not None:
            value = value * weights
        if bias is not None:
            value = value + biases
        value = value * gates
        if keys is not None:
            value = value * dropout_of(keys, rows, columns, total, threshold, kept_scale)
        tl.store(out + rows * width + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["total"])
def backward_kernel(
    grad, x, gate, weight, bias, keys, dx, d_gate, d_weight, d_bias,
    total, width, stride_grad, stride_x, stride_gate, eps, threshold, kept_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        weights = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    if bias is not None:
        biases = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    weight_sum = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    bias_sum = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (rows < total) & (columns < width)
        d_product = tl.load(grad + rows * stride_grad + columns, mask=inside, other=0.0).to(tl.float32)
        x_tile = tl.load(x + rows * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(gate + rows * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
        if keys is not None:
            d_product = d_product * dropout_of(keys, rows, columns, total, threshold, kept_scale)
        normalised, rstd = normalise(x_tile, inside, width, eps)
        value = normalised
        d_value = d_product * gates
        d_normalised = d_value
        if weight is not None:
            value = value * weights
            d_normalised = d_value * weights
            weight_sum += d_value * normalised
        if bias is not None:
            value = value + biases
            bias_sum += d_value
        d_x = gradient_of_normalise(d_normalised, normalised, rstd, width)
        tl.store(dx + rows * width + columns, d_x.to(dx.dtype.element_ty), mask=inside)
        tl.store(d_gate + rows * width + columns, (d_product * value).to(d_gate.dtype.element_ty), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * width + columns
    if weight is not None:
        tl.store(d_weight + partial, tl.sum(weight_sum, 0)[None, :], mask=columns < width)
    if bias is not None:
        tl.store(d_bias + partial, tl.sum(bias_sum, 0)[None, :], mask=columns < width)


def _halves(keys: Tensor | None, dropout: float) -> Tensor | None:
    """int64 keys `[T]` as int32 `[T, 2]`, low half first; None when nothing is dropped."""
    if keys is None or dropout == 0.0:
        return None
    return (keys if keys.stride(0) == 1 else keys.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def forward(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, eps: float, dropout: float
) -> Tensor:
    """`[T, C]`, of the dtype of x; `keys [T]` int64 or None."""
    x, gate = packed(x), packed(gate)
    total, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = block_of(width)
    rows = rows_of(block, 64)
    if total:
        forward_kernel[(min(triton.cdiv(total, rows), PROGRAMS),)](
            x, gate, _contiguous(weight), _contiguous(bias), _halves(keys, dropout), out,
            total, width, x.stride(0), gate.stride(0), eps, round(dropout * 2**31), 1.0 / (1.0 - dropout),
            ROWS=rows, BLOCK=block, num_warps=warps_of(rows * block, ELEMENTS_A_THREAD),
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None,
    eps: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, gate, weight and bias, in their dtypes; None for an absent one."""
    grad, x, gate = packed(grad), packed(x), packed(gate)
    total, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    block = block_of(width)
    rows = rows_of(block, 64)
    programs = min(triton.cdiv(total, rows), PROGRAMS)
    d_weight, d_bias = (
        None if parameter is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
        for parameter in (weight, bias)
    )
    if total:
        backward_kernel[(programs,)](
            grad, x, gate, _contiguous(weight), _contiguous(bias), _halves(keys, dropout), dx, d_gate, d_weight, d_bias,
            total, width, grad.stride(0), x.stride(0), gate.stride(0), eps, round(dropout * 2**31),
            1.0 / (1.0 - dropout), ROWS=rows, BLOCK=block, num_warps=warps_of(rows * block, ELEMENTS_A_THREAD),
        )  # fmt: skip
    return (
        dx,
        d_gate,
        None if weight is None or d_weight is None else d_weight.sum(0).to(weight.dtype),
        None if bias is None or d_bias is None else d_bias.sum(0).to(bias.dtype),
    )


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
