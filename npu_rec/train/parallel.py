"""The parameters outside the tables on several ranks: whole on each (DDP), or sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from npu_rec.config import ParallelConfig
from npu_rec.device import Device
from npu_rec.distributed import World
from npu_rec.models import Backbone
from npu_rec.tasks import Prepared, Task

Loss = Callable[[Prepared], tuple[Tensor, Tensor]]


def sharded_tables(task: Task) -> set[nn.Parameter]:
    """Parameters that are a rank's own part of a table: no other rank has them."""
    if task.tables.ranks == 1:
        return set()
    return {p for table in task.tables.tables.values() for p in table.parameters()}


class DenseParallel:
    """How ranks share the parameters of a task outside the tables.

    After a backward pass their gradients are the mean over the ranks of each rank's own.

    Attributes:
        loss: `task.loss`, by a way on which the ranks' gradients meet.
    """

    def __init__(self, task: Task, config: ParallelConfig, world: World, device: Device, *, all_used: bool) -> None:
        """`all_used`: whether every parameter has a part in every loss."""
        self.loss: Loss = task.loss
        self._ddp: DistributedDataParallel | None = None
        if world.size == 1:
            return
        apart = sharded_tables(task)
        if config.dense == "fsdp":
            _shard(task, config, world, device, apart)
            self.loss = task.loss  # it has hooks now
            return
        step = _Step(task)
        ignored = [f"task.{name}" for name, p in task.named_parameters() if p in apart]
        ignored += [f"task.{name}" for name, _ in task.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, ignored)
        self._ddp = DistributedDataParallel(
            step, process_group=world.group, find_unused_parameters=not all_used, init_sync=world.real
        )
        if config.reduce == "bf16" or not world.real:  # PyTorch's own hook for bf16 is for nccl alone
            dtype = torch.bfloat16 if config.reduce == "bf16" else None
            self._ddp.register_comm_hook(world, lambda world, bucket: world.mean(bucket.buffer(), dtype))
        self.loss = self._ddp

    def more_follows(self) -> AbstractContextManager[None]:
        """Around a batch whose gradients are added to those of the next before they are exchanged."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()


class _Step(nn.Module):
    """DDP hooks the forward pass of a module; the loss is one."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        return self.task.loss(prepared)


def _shard(task: Task, config: ParallelConfig, world: World, device: Device, apart: set[nn.Parameter]) -> None:
    mesh = world.mesh(device.torch_device.type)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if config.reduce == "bf16" else None)
    for module in task.modules():
        if isinstance(module, Backbone):
            for layer in getattr(module, "layers", []):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(task, mesh=mesh, mp_policy=policy, ignored_params=apart)
    for method in ("loss", "observe", "ranks"):
        register_fsdp_forward_method(task, method)
