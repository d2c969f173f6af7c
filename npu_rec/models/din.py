"""DIN, Deep Interest Network (arXiv 1706.06978): a candidate weighs the events before it, one by one.

    y_c = sum_j a(x_c, x_j) x_j            a = W_2 prelu(W_1 [x_j, x_c, x_j - x_c, x_j * x_c] + b_1) + b_2

over the history of the candidate; weights are not normalised. What the paper puts behind it, layers on the sum and the
candidate's vector, is the head of the ranking task (`head: ffn`). Its batch normalisation (Dice) is left out, because
with it a row's output depends on the batch; PReLU is what the paper has without. The events have no order here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from npu_rec.config import ModelConfig, OpsConfig, Section
from npu_rec.models.backbone import Backbone, Layout
from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.registry import register


class DINOptions(Section):
    """`model.options` of `backbone: din`."""

    hidden_dim: int = Field(36, ge=1, description="Width of the unit that weighs an event.")


@register("model", "din", options=DINOptions)
class DIN(Backbone):
    """Sums of the history for candidates, zeros for the events of the history; for layouts with targets alone."""

    learned_positions: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        super().__init__(config, options, ops)
        width, hidden = config.embedding_dim, options.hidden_dim
        self.of_event = nn.Linear(width, hidden, bias=False)
        self.of_candidate = nn.Linear(width, hidden)
        self.of_product = nn.Linear(width, hidden, bias=False)
        self.slope = nn.Parameter(torch.full((hidden,), 0.25))  # of the PReLU below zero
        self.weigh = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        assert layout.num_targets is not None
        events, candidates = pairs(layout.offsets, layout.num_targets)
        # W_1 of the four parts side by side is one map of the event, one of the candidate and one of their product
        of_events, of_candidates = self.of_event(x), self.of_candidate(x)
        unit = of_events[events] + of_candidates[candidates] + self.of_product(x[events] * x[candidates])
        weighed = self.weigh(unit.clamp_min(0) + self.slope * unit.clamp_max(0)) * x[events]
        return torch.zeros_like(x).index_add(0, candidates, weighed.to(x.dtype))

    def flops(self, lengths: Tensor) -> float:
        """For one candidate a sequence."""
        tokens, width = float(lengths.sum()), self.of_event.weight.numel()
        return tokens * (2.0 * 3.0 * width + 2.0 * self.weigh.weight.numel())


def pairs(offsets: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of every (event of a history, candidate behind it): two times `[P]` int64, by candidate."""
    histories = offsets_to_lengths(offsets) - num_targets
    sequences = torch.repeat_interleave(torch.arange(len(num_targets), device=offsets.device), num_targets)
    slot = torch.arange(len(sequences), device=offsets.device) - (torch.cumsum(num_targets, 0) - num_targets)[sequences]
    candidates = offsets[sequences] + histories[sequences] + slot
    counts = histories[sequences]
    owners = torch.repeat_interleave(torch.arange(len(candidates), device=offsets.device), counts)
    place = torch.arange(len(owners), device=offsets.device) - (torch.cumsum(counts, 0) - counts)[owners]
    return offsets[sequences][owners] + place, candidates[owners]
