"""HSTU's relative bias as a part of an attention layer, of any backbone."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from npu_rec.config import ModelConfig, Section, refuse_idle
from npu_rec.models.backbone import Layout
from npu_rec.ops import RelativeBias

BUCKETS = Field(128, ge=1, le=144, description="Logarithmic buckets of the relative time bias.")


class BiasOptions(Section):
    """The bias among the options of a backbone with softmax attention."""

    bias: Literal["none", "position", "position_time"] = Field(
        "none", description="HSTU's relative bias, added to the attention scores of every layer."
    )
    time_buckets: int = BUCKETS

    @model_validator(mode="after")
    def _consistent(self) -> BiasOptions:
        refuse_idle(self, {"time_buckets": self.bias != "position_time" and f"bias is {self.bias}"})
        return self


class BiasedAttention(nn.Module):
    """An attention layer that may have the tables of a `RelativeBias`, `[2N - 1]` and `[buckets + 1]`."""

    position_weight: nn.Parameter | None
    time_weight: nn.Parameter | None

    def add_bias(self, config: ModelConfig, kind: str, buckets: int) -> None:
        """Make the tables of `kind`, a value of `BiasOptions.bias`; `reset_bias` fills them."""
        self.position_weight = self.time_weight = None
        if kind != "none":
            self.position_weight = nn.Parameter(torch.empty(2 * (config.max_seq_len + config.max_output_len) - 1))
        if kind == "position_time":
            self.time_weight = nn.Parameter(torch.empty(buckets + 1))

    def reset_bias(self) -> None:
        """N(0, 0.02^2), as in Meta's code."""
        for table in (self.position_weight, self.time_weight):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def relative_bias(self, layout: Layout) -> RelativeBias | None:
        """The operator's argument."""
        if self.position_weight is None:
            return None
        if self.time_weight is None:
            return RelativeBias(self.position_weight)
        return RelativeBias(self.position_weight, self.time_weight, layout.query_times, layout.key_times)
