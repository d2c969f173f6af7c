"""Updates of one row `[BLOCK]`, float32 and zero beyond its width (equations: `npu_rec.ops.row_optimizer`)."""

import triton
import triton.language as tl


@triton.jit
def shortened(g, max_norm):
    """`g`, scaled to the length `max_norm` where it is longer."""
    length = tl.sqrt(tl.sum(g * g, 0))
    longer = length > max_norm
    return tl.where(longer, g * (max_norm / tl.where(longer, length, 1.0)), g)


@triton.jit
def mean_square(g, width):
    return tl.sum(g * g, 0) / width


@triton.jit
def moving_average(average, value, beta, rest):
    """`rest` is 1 - beta, which float32 would lose digits of."""
    return beta * average + rest * value
