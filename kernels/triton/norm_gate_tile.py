"""LayerNorm of rows that lie whole in a tile `[ROWS, BLOCK]`, float32."""

import triton
import triton.language as tl


@triton.jit
def normalise(x, inside, width, eps):
    """`(x - mean) / deviation`, zero outside, and 1 / deviation `[ROWS, 1]`; `x` is zero outside."""
    mean = tl.sum(x, 1)[:, None] / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, 1)[:, None] / width + eps)
    return tl.where(inside, centred * rstd, 0.0), rstd


@triton.jit
def gradient_of_normalise(d_normalised, normalised, rstd, width):
    """The gradient of x; both tiles are zero outside."""
    mean = tl.sum(d_normalised, 1)[:, None] / width
    along = tl.sum(d_normalised * normalised, 1)[:, None] / width
    return rstd * (d_normalised - mean - normalised * along)
