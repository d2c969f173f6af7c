"""Optimiser and learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from npu_rec.config import TrainConfig


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay, foreach=True
    )


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant or a half cosine."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = min(1.0, (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps))
    return train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
