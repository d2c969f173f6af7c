"""What launches have in common: shapes of tiles, numbers of warps, rows that lie packed."""

import os

import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 2048  # elements of a tile, where its width leaves the choice


def block_of(width: int) -> int:
    """The power of two that `width` is padded to."""
    return int(triton.next_power_of_2(max(width, 1)))


def rows_of(block: int, most: int) -> int:
    """Rows of a tile that is `block` wide: a power of two up to `most`, itself one."""
    return max(1, min(TILE // block, most))


def warps_of(elements: int, each: int = 16) -> int:
    """Warps for a tile of so many elements, of which a thread holds `each`; at most 16.

    A rule and not the autotuner: with other warps a sum is added up in another order, and the autotuner may choose
    otherwise in the next run.
    """
    return min(max(elements // (32 * each), 1), 16)


def packed(x: Tensor) -> Tensor:
    """`x [T, C]` with a stride of 1 along its rows, which may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()
