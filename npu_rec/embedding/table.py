"""A table of item vectors that lives whole in the memory of one device."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from npu_rec.ops import RowOptimizer, embedding_lookup
from npu_rec.ops.random import random_key, random_truncated_normal

_ROWS_AT_ONCE = 1 << 16


class EmbeddingTable(nn.Module):
    """`weight [V, D]`: an ordinary parameter, or, with an `optimizer`, one that the backward pass updates by itself.

    Row r starts as a pure function of (seed, name, r), truncated normal with deviation `std`, so a
    table that grows, or is cut over ranks, starts the same.
    """

    def __init__(
        self, name: str, num_rows: int, dim: int, *, seed: int, std: float = 0.02, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.name, self.seed, self.std, self.backend = name, seed, std, backend
        self.optimizer: RowOptimizer | None = None
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every row its initial value."""
        table = zlib.crc32(self.name.encode())
        for ids in torch.arange(self.weight.shape[0]).split(_ROWS_AT_ONCE):
            keys = random_key(self.seed, "rows", table, ids)
            rows = random_truncated_normal(keys, self.weight.shape[1], self.std)
            self.weight[ids[0] : ids[-1] + 1] = rows.to(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids [T]` int64 -> `[T, D]`."""
        return embedding_lookup(self.weight, ids, optimizer=self.optimizer, backend=self.backend)
