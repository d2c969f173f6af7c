"""From a candidate's hidden state and its item vector to one number for each target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

EPS = 1e-5


class SwishNorm(nn.Module):
    """`x * sigmoid(LayerNorm(x))`, of Meta's production model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`[M, C]` -> `[M, C]`."""
        return x * torch.sigmoid(self.norm(x))


class Head(nn.Module):
    """`states [M, E]`, `items [M, E]` -> `[M, num_targets]`.

    `dot`: `(W_t state) . item / sqrt(E) + b_t` for target t. `mlp`: layers with SwishNorm on `state * item`, as
    DLRM-HSTU. `ffn`: layers with ReLU on both side by side.
    """

    def __init__(self, kind: Literal["dot", "mlp", "ffn"], width: int, hidden: Sequence[int], num_targets: int) -> None:
        super().__init__()
        self.kind, self.num_targets = kind, num_targets
        if kind == "dot":
            self.layers: nn.Module = nn.Linear(width, num_targets * width, bias=False)
            self.bias = nn.Parameter(torch.zeros(num_targets))
            return
        layers: list[nn.Module] = []
        size = width if kind == "mlp" else 2 * width
        for wide in hidden:
            layers += [nn.Linear(size, wide), SwishNorm(wide) if kind == "mlp" else nn.ReLU()]
            size = wide
        self.layers = nn.Sequential(*layers, nn.Linear(size, num_targets))

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        if self.kind == "dot":
            users: Tensor = self.layers(states).unflatten(1, (self.num_targets, -1))
            scores: Tensor = (users * items.unsqueeze(1)).sum(2) * items.shape[1] ** -0.5
            return scores + self.bias
        out: Tensor = self.layers(states * items if self.kind == "mlp" else torch.cat([states, items], 1))
        return out

    def flops(self, rows: float) -> float:
        """Floating-point operations of the linear maps for so many rows."""
        return sum(2.0 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)) * rows
