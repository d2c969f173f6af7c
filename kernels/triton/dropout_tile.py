"""Dropout by counter on tiles, bit for bit that of `npu_rec.ops.random.dropout_scale`."""

import triton
import triton.language as tl


@triton.jit
def mixed(z):
    """The finaliser of MurmurHash3 (`_mix32` there), int32: a right shift copies the sign, which the mask clears."""
    z = (z ^ ((z >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    z = (z ^ ((z >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return z ^ ((z >> 16) & 0xFFFF)


@triton.jit
def dropout_scale(low, high, channel, threshold, kept_scale):
    """Multipliers, float32: 0 or `kept_scale`.

    `low`, `high`: the halves of the 64-bit keys, int32 `[ROWS, 1]`; `channel`: int32 `[1, BLOCK]`. Of 2^31 draws
    `threshold` are dropped.
    """
    bits = mixed(mixed(channel * -1640531527 + low) ^ high)  # 0x9E3779B9
    return tl.where((bits & 0x7FFFFFFF) >= threshold, kept_scale, 0.0)
