"""Vectors of actions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

STD = 0.1
BIT_DIM = 8  # of the vector of one bit, as in Meta's production model


class ActionEncoder(nn.Module):
    """`actions [T]` -> `[T, D]`; one learned vector stands for an action that must not be seen.

    `value`: a vector for each action. `bits`: actions are sets of bits, each bit has a vector of `BIT_DIM` channels,
    zeros where it is not set, and a linear map brings all of them to D (DLRM-HSTU, Meta's generative-recommenders).
    """

    def __init__(self, kind: Literal["value", "bits"], num_actions: int, width: int, *, hides: bool) -> None:
        """`num_actions`: the largest action and one. `hides`: some actions must not be seen."""
        super().__init__()
        self.kind = kind
        self.hidden = nn.Parameter(torch.empty(width)) if hides else None
        if self.hidden is not None:
            nn.init.normal_(self.hidden, std=STD)
        if kind == "value":
            self.weight = nn.Parameter(torch.empty(num_actions, width))
        else:
            bits = max(1, (num_actions - 1).bit_length())
            self.weight = nn.Parameter(torch.empty(bits, BIT_DIM))
            self.project = nn.Linear(bits * BIT_DIM, width)
        nn.init.normal_(self.weight, std=STD)

    def forward(self, actions: Tensor, visible: Tensor | None = None) -> Tensor:
        """`[T, D]`.

        Args:
            actions: `[T]` int64, 0 or more.
            visible: `[T]` bool; None: all.
        """
        if self.kind == "value":
            vectors = self.weight[actions]
        else:
            places = torch.arange(self.weight.shape[0], device=actions.device)
            is_set = (actions.unsqueeze(1) >> places) & 1
            vectors = self.project((is_set.to(self.weight.dtype).unsqueeze(2) * self.weight).flatten(1))
        if visible is None or self.hidden is None:
            return vectors
        return torch.where(visible.unsqueeze(1), vectors, self.hidden)
