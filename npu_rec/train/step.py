"""One optimiser step on all ranks: gradients of the mean loss of the global batch, whoever holds which sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from npu_rec.config import Config
from npu_rec.device import Device
from npu_rec.distributed import World
from npu_rec.ops import RowOptimizer
from npu_rec.tasks import Prepared, Task
from npu_rec.train.optim import row_learning_rate, table_weights
from npu_rec.train.parallel import DenseParallel, sharded_tables


@dataclass(frozen=True)
class StepResult:
    """Of all ranks together.

    Attributes:
        loss_sum, weight_sum: their quotient is the loss.
        norm: of the gradients that `train.clip` speaks of.
    """

    loss_sum: float
    weight_sum: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss_sum) and math.isfinite(self.norm)


class Stepper:
    """Forward, backward, and what ranks add up between them.

    The losses of a batch are summed, and divided by the weights of the global batch as soon as those are known; so
    the mean does not depend on how the batch is cut.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        world: World,
        device: Device,
        optimizer: torch.optim.Optimizer,
        row_optimizers: Sequence[RowOptimizer],
        dense: DenseParallel,
    ) -> None:
        self.task, self.config, self.world, self.device = task, config, world, device
        self.optimizer, self.row_optimizers, self.dense = optimizer, row_optimizers, dense
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        self._own = sharded_tables(task)

    def gradients(
        self, group: Sequence[Prepared], lr: float, step: int, after_lookups: Callable[[], None]
    ) -> StepResult:
        """Gradients of the batches of one step; with row optimisers the rows are changed already.

        Args:
            after_lookups: called when the tables have been read for the last time.
        """
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        for rows in self.row_optimizers:
            rows.lr = row_learning_rate(self.config, lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, weight_sum = 0.0, 0.0
        for i, prepared in enumerate(group):
            with self.dense.more_follows() if i + 1 < len(group) else nullcontext():
                last = i + 1 == len(group)
                loss, weight = self._forward_backward(prepared, step, after_lookups if last else _nothing)
            loss_sum, weight_sum = loss_sum + loss, weight_sum + weight
        self._scale(weight_sum or 1.0)
        return StepResult(loss_sum, weight_sum, self._clipped_norm())

    def _forward_backward(
        self, prepared: Prepared, step: int, after_lookups: Callable[[], None]
    ) -> tuple[float, float]:
        with self.world.watch(f"forward pass of step {step}"), self.device.autocast(self.dtype):
            losses, weights = self.dense.loss(prepared.to(self.device.torch_device))
        after_lookups()
        own = torch.tensor([float(losses.detach()), float(weights)], dtype=torch.float64)
        loss, weight = self.world.all_reduce(own, f"loss of step {step}").tolist()
        with self.world.watch(f"backward pass of step {step}"):
            if not self.row_optimizers:
                losses.backward()
            elif math.isfinite(loss):  # rows change in the backward pass: later is too late
                (losses / (weight or 1.0)).backward()  # the only batch of the step (config.py)
            self.device.synchronize()
        return loss, weight

    def _scale(self, weight_sum: float) -> None:
        """From the mean over ranks of gradients of sums to gradients of the mean."""
        for parameter in self.task.parameters():
            if parameter.grad is None:
                continue
            if not self.row_optimizers:
                parameter.grad /= weight_sum
            if self.world.size > 1 and parameter not in self._own:
                parameter.grad *= self.world.size

    def _clipped_norm(self) -> float:
        train = self.config.train
        apart = set() if train.clip == "global" else table_weights(self.task)
        parameters = [p for p in self.task.parameters() if p not in apart and p.grad is not None]
        norm = self._total_norm(parameters)
        if train.clip_norm is not None:
            for kind in _kinds(parameters):
                nn.utils.clip_grads_with_norm_(kind, train.clip_norm, norm, foreach=True)
        return float(norm)

    def _total_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        norms = []
        for kind in _kinds([p for p in parameters if p not in self._own]):
            norm = nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None], foreach=True)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if self._own:  # each rank has a part of the tables
            own = [p.grad for p in parameters if p in self._own and p.grad is not None]
            squares = nn.utils.get_total_norm(own, foreach=True).square().reshape(1).to(self.device.torch_device)
            norms.append(self.task.tables.rows_world.all_reduce(squares, "norm of the tables' gradients").sqrt()[0])
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _nothing() -> None:
    pass


def _kinds(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded parameters and others: foreach functions do not mix them."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]
