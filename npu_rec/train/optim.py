"""Optimisers and learning rate."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from npu_rec.config import Config, TrainConfig
from npu_rec.embedding import StaticTable
from npu_rec.ops import RowOptimizer
from npu_rec.tasks import Task


def attach_row_optimizers(task: Task, config: Config, folder: Path) -> list[RowOptimizer]:
    """Give every table the optimiser of `embedding.optimizer` (none when that is `dense`) and its tier below.

    Args:
        folder: for the files of a disk tier, where `embedding.tier_path` names none.
    """
    if config.embedding.optimizer == "dense":
        return []
    optimizers = []
    for table in task.tables.tables.values():
        optimizer = RowOptimizer(
            config.embedding.optimizer,
            lr=row_learning_rate(config, config.train.lr),
            betas=config.train.betas,
            eps=config.train.eps,
            max_norm=config.train.clip_norm if config.train.clip == "row" else None,
        )
        table.use(optimizer)
        table.open_tier((config.embedding.tier_path or folder) / f"rank-{task.world.rank}")
        optimizers.append(optimizer)
    return optimizers


def table_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights of all tables that are parameters."""
    return {module.weight for module in model.modules() if isinstance(module, StaticTable)}


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters but the tables that update themselves."""
    own = {m.weight for m in model.modules() if isinstance(m, StaticTable) and m.optimizer is not None}
    parameters = [p for p in model.parameters() if p not in own]
    sharded = [p for p in parameters if isinstance(p, DTensor)]  # foreach functions do not mix them with others
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    groups = [{"params": group} for group in (whole, sharded) if group]
    return torch.optim.AdamW(
        groups, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay, foreach=True
    )


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant or a half cosine."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = min(1.0, (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps))
    return train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def row_learning_rate(config: Config, lr: float) -> float:
    """What the rows of tables learn with while everything else learns with `lr`."""
    return lr if config.embedding.lr is None else lr / config.train.lr * config.embedding.lr
