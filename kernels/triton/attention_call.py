"""One call of HSTU attention, as the kernels of every device receive it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """Arguments as `npu_rec.ops.hstu_attention` describes them. Strides of the last dimension are 1.

    Attributes:
        position: `[2N - 1]` float32 or None; time: `[buckets + 1]` float32 or None.
        query_seconds, key_seconds: `[T]` int32, their differences fit int32; None without `time`.
        edges: `[buckets + 2]` int32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    num_targets: Tensor | None
    position: Tensor | None
    time: Tensor | None
    query_seconds: Tensor | None
    key_seconds: Tensor | None
    edges: Tensor
    max_seq_len: int
    alpha: float
    divisor: float
    causal: bool
    context: int
    window: int
    full: int

    @property
    def buckets(self) -> int:
        """The largest time bucket."""
        return self.edges.shape[0] - 2

    def numbers(self) -> tuple[float | int, ...]:
        """Arguments from `alpha` to `buckets`."""
        return self.alpha, 1.0 / self.divisor, self.context, self.window, self.full, self.buckets

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that every device has."""
        return {
            "QK": self.q.shape[2],
            "V": self.v.shape[2],
            "CAUSAL": self.causal,
            "HAS_TARGETS": self.num_targets is not None,
            "HAS_CONTEXT": self.context > 0,
            "HAS_WINDOW": self.window > 0,
            "HAS_POSITION": self.position is not None,
            "HAS_TIME": self.time is not None,
            "BLOCK_QK": block_of_head(self.q.shape[2]),
            "BLOCK_V": block_of_head(self.v.shape[2]),
            "BLOCK_BUCKETS": triton.next_power_of_2(self.buckets + 1),
        }

    @property
    def width(self) -> int:
        """The wider of the two padded head dimensions."""
        return max(block_of_head(self.q.shape[2]), block_of_head(self.v.shape[2]))


def block_of_head(width: int) -> int:
    """The power of two that a head is padded to: at least 16, which matrix products need."""
    return max(16, int(triton.next_power_of_2(width)))
