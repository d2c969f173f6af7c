"""What the requests of `hstu_attention` and `softmax_attention` have in common, for code that serves both."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from npu_rec.ops.masks import MaskRule


class AttentionRequest(Protocol):
    """One call of attention with a mask and a relative bias (shapes in `hstu_attention`)."""

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def offsets(self) -> Tensor: ...
    @property
    def num_targets(self) -> Tensor | None: ...
    @property
    def position_weight(self) -> Tensor | None: ...
    @property
    def time_weight(self) -> Tensor | None: ...
    @property
    def query_time(self) -> Tensor | None: ...
    @property
    def key_time(self) -> Tensor | None: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def rule(self) -> MaskRule: ...

    @property
    def alpha(self) -> float:
        """Factor on q k^T."""

    @property
    def offsets_of_queries(self) -> Tensor:
        """`[B + 1]`: which queries are of which sequence."""

    @property
    def tokens_of_queries(self) -> Tensor:
        """`[Tq]` int64: the key that is the same token."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
