"""Random numbers by counter: a draw is a pure function of what it is for.

A 64-bit key is made from (seed, purpose, epoch, sequence id, position, ...); values are hashes of
key and index. So a draw does not depend on how tokens are packed, batched or spread over ranks.
Keys mix with splitmix64 (Steele, Lea, Flood 2014); values with the 32-bit finaliser of
MurmurHash3, twice, in int32 arithmetic, which every target device does in vector units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops.compiled import extension, instruction_set, unusable

_PURPOSES = {
    "dropout": 1, "negatives": 2, "rows": 3, "shuffle": 4, "data": 5, "owner": 6, "admission": 7, "length": 8,
    "events": 9, "fraction": 10, "contrast": 11, "views": 12,
}  # fmt: skip


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_GAMMA = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix64_int(z: int) -> int:
    z &= 2**64 - 1
    z = ((z ^ (z >> 30)) * _MIX1) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * _MIX2) & (2**64 - 1)
    return z ^ (z >> 31)


def _shift64(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # >> is arithmetic on int64: clear the copied sign


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ _shift64(z, 30)) * _signed(_MIX1, 64)
    z = (z ^ _shift64(z, 27)) * _signed(_MIX2, 64)
    return z ^ _shift64(z, 31)


def random_key(seed: int, purpose: str, *parts: int | Tensor) -> Tensor:
    """64-bit keys from a seed, a purpose and integers or int64 tensors that broadcast, a tensor among them.

    Returns:
        int64 tensor of the broadcast shape.
    """
    state = _mix64_int(_mix64_int(seed + _GAMMA) + _PURPOSES[purpose] * _GAMMA)
    keys: Tensor | None = None
    for part in parts:
        if keys is None and isinstance(part, int):
            state = _mix64_int(state + (part + 1) * _GAMMA)
        else:
            before = torch.tensor(_signed(state, 64)) if keys is None else keys
            step = _signed((part + 1) * _GAMMA, 64) if isinstance(part, int) else (part + 1) * _signed(_GAMMA, 64)
            keys = _mix64(before + step)
    if keys is None:
        raise TypeError("random_key needs a tensor among its parts")
    return keys


def _shift32(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (32 - bits)) - 1)


def _mix32(z: Tensor) -> Tensor:
    z = (z ^ _shift32(z, 16)) * _signed(0x85EBCA6B, 32)
    z = (z ^ _shift32(z, 13)) * _signed(0xC2B2AE35, 32)
    return z ^ _shift32(z, 16)


def random_bits(keys: Tensor, count: int) -> Tensor:
    """`keys [...]` int64 -> `[..., count]` int32 with 32 random bits each."""
    return _bits_at(keys, torch.arange(count, dtype=torch.int32, device=keys.device))


def _bits_at(keys: Tensor, places: Tensor) -> Tensor:
    """The numbers `places [..., M]` int32 of the random bits of `keys [...]`; `[..., M]`."""
    low = keys.to(torch.int32).unsqueeze(-1)
    high = (keys >> 32).to(torch.int32).unsqueeze(-1)
    return _mix32(_mix32(places * _signed(0x9E3779B9, 32) + low) ^ high)


def random_uniform(keys: Tensor, count: int) -> Tensor:
    """`keys [...]` -> `[..., count]` float32 in (0, 1), odd multiples of 2^-24."""
    # 23 bits: with one more, adding a half would round the largest up to 1
    return ((random_bits(keys, count) >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)


def random_integers(keys: Tensor, count: int, high: int) -> Tensor:
    """`keys [...]` -> `[..., count]` int64, uniform in 0..high-1.

    For high below 2^31 from 32 bits, with a bias below high / 2^32; else from 62 bits (high / 2^62).
    """
    if not 1 <= high < 2**61:
        raise ValueError(f"high must be in 1..2^61 - 1, got {high}")
    if high < 2**31:
        if keys.device.type == "cpu":
            return torch.ops.npu_rec.random_integers(keys, count, high)  # type: ignore[no-any-return]
        return plain_random_integers(keys, count, high)
    upper, lower = (random_bits(keys, 2 * count).to(torch.int64) & 0x7FFFFFFF).unflatten(-1, (count, 2)).unbind(-1)
    drawn: Tensor = ((upper << 31) | lower) % high
    return drawn


def plain_random_integers(keys: Tensor, count: int, high: int) -> Tensor:
    """`random_integers` for high below 2^31, in plain PyTorch."""
    bits = random_bits(keys, count).to(torch.int64) & 0xFFFFFFFF
    return (bits * high) >> 32


@torch.library.custom_op("npu_rec::random_integers", mutates_args=(), device_types="cpu")
def _integers_on_cpu(keys: Tensor, count: int, high: int) -> Tensor:
    if unusable() is not None:
        return plain_random_integers(keys, count, high)
    drawn: Tensor = extension().random_integers(keys, count, high, instruction_set())
    return drawn


@_integers_on_cpu.register_fake
def _(keys: Tensor, count: int, high: int) -> Tensor:
    return keys.new_empty((*keys.shape, count))


def random_truncated_normal(keys: Tensor, count: int, std: float) -> Tensor:
    """`keys [...]` -> `[..., count]` float32, normal with deviation `std` cut at two deviations."""
    reach = 0.9544997361036416  # probability within two deviations
    uniform = random_uniform(keys, count)
    normal: Tensor = torch.erfinv((2.0 * uniform - 1.0) * reach) * (std * 2.0**0.5)
    return normal


def dropout_scale(keys: Tensor, count: int, probability: float) -> Tensor:
    """Multipliers of inverted dropout, `[..., count]` float32: 0 with `probability`, else 1 / (1 - probability)."""
    return dropout_scale_at(keys, torch.arange(count, device=keys.device), probability)


def dropout_scale_at(keys: Tensor, places: Tensor, probability: float) -> Tensor:
    """The multipliers number `places [..., M]` of `keys [...]` that `dropout_scale` gives; `[..., M]` float32."""
    threshold = min(round(probability * 2**31), 2**31 - 1)
    kept = (_bits_at(keys, places.to(torch.int32)) & 0x7FFFFFFF) >= threshold
    return kept.to(torch.float32).mul_(1.0 / (1.0 - probability))


def dropout(x: Tensor, probability: float, keys: Tensor | None) -> Tensor:
    """Dropout of `x [T, C]` that depends on `keys [T]` int64 alone. No keys, or probability 0: `x` itself."""
    if probability == 0.0 or keys is None:
        return x
    return x * dropout_scale(keys, x.shape[-1], probability).to(x.dtype)


def derive_keys(keys: Tensor, part: int) -> Tensor:
    """New keys `[...]` int64 from `keys`, one family for each `part` (a layer, a place in it)."""
    return _mix64(keys + _signed((part + 1) * _GAMMA, 64))
