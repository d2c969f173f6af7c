"""Vectors of categorical features with any number of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from npu_rec.data.features import Codes

STD = 0.02


class FeatureTable(nn.Module):
    """The mean of the vectors of a row's values, zeros for a row without one.

    Attributes:
        values, offsets: the codes of all rows, `[V]` and `[R + 1]`; not saved, they are the data set's.
    """

    values: Tensor
    offsets: Tensor

    def __init__(self, codes: Codes, width: int) -> None:
        super().__init__()
        self.register_buffer("values", codes.values, persistent=False)
        self.register_buffer("offsets", codes.offsets, persistent=False)
        self.weight = nn.Parameter(torch.empty(codes.size + 1, width))
        nn.init.normal_(self.weight, std=STD)

    def forward(self, rows: Tensor) -> Tensor:
        """`rows [T]` int64 -> `[T, E]`."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        total = int(counts.sum())
        owners = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts, output_size=total)
        slot = torch.arange(total, device=rows.device) - (torch.cumsum(counts, 0) - counts)[owners]
        vectors = self.weight[self.values[self.offsets[rows][owners] + slot]]
        sums = vectors.new_zeros(len(rows), vectors.shape[1]).index_add(0, owners, vectors)
        return sums / counts.clamp_min(1).unsqueeze(1)


class SideInformation(nn.Module):
    """Item vectors with the features of the items: the mean of all, or a linear map of all of them side by side."""

    def __init__(self, codes: Mapping[str, Codes], pooling: Literal["mean", "project"], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: FeatureTable(each, width) for name, each in codes.items()})
        self.project = None
        if pooling == "project" and codes:
            self.project = nn.Linear((1 + len(codes)) * width, width, bias=False)

    def forward(self, item_ids: Tensor, vectors: Tensor) -> Tensor:
        """`item_ids [T]`, their rows `vectors [T, E]` -> `[T, E]`."""
        if not self.tables:
            return vectors
        every = [vectors, *(table(item_ids) for table in self.tables.values())]
        if self.project is None:
            return torch.stack(every).mean(0)
        joined: Tensor = self.project(torch.cat(every, 1))
        return joined
