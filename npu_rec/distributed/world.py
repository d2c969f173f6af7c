"""The processes that train together, and the collectives between them; one process is a world of its own.

Every collective has a name (`what`), which the watchdog prints when it hangs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from npu_rec.device import Device
from npu_rec.distributed import recovery
from npu_rec.distributed.rendezvous import meet
from npu_rec.distributed.sections import event_recorder
from npu_rec.distributed.watchdog import Watchdog
from npu_rec.errors import ConfigError, DistributedError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Some ranks, this process one of them. Without a group it is alone and collectives are the identity.

    Attributes:
        real: whether the other ranks exist (`mirror.py` imagines them).
        rank, size: this process among them.
        group: moves tensors of the host (gloo) and of the device (gloo, nccl, hccl); None when alone.
        groups: the ranks of the whole world as `split` divided them; empty: this is the whole.
        watchdog: ends this process when a collective hangs; None when alone.
    """

    real: ClassVar[bool] = True

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    groups: tuple[Sequence[int], ...] = ()
    watchdog: Watchdog | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def watch(self, what: str) -> AbstractContextManager[Any]:
        """A stretch of work in which ranks wait for each other, under the watchdog."""
        return nullcontext() if self.watchdog is None else self.watchdog.section(what, self.group)

    def barrier(self, what: str) -> None:
        """Wait for all ranks."""
        self.all_reduce(torch.zeros(1), what)

    def all_reduce(self, values: Tensor, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """`values`, in place, the sum (or another `op`) over all ranks."""
        if self.group is not None:
            with self.watch(what):
                dist.all_reduce(values, op, group=self.group)
        return values

    def all_to_all(self, send: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], what: str) -> Tensor:
        """Rows of `send [sum of send_counts, ...]` to the ranks in their order; what they sent here, in that order."""
        if self.group is None:
            return send
        received = send.new_empty((sum(receive_counts), *send.shape[1:]))
        with self.watch(what):
            dist.all_to_all_single(
                received, send.contiguous(), list(receive_counts), list(send_counts), group=self.group
            )
        return received

    def all_gather(self, values: T, what: str) -> list[T]:
        """A small Python object of every rank, by rank."""
        if self.group is None:
            return [values]
        gathered: list[Any] = [None] * self.size
        with self.watch(what):
            dist.all_gather_object(gathered, values, group=self.group)
        return gathered

    def broadcast(self, values: T, what: str) -> T:
        """The first rank's Python object."""
        return self.all_gather(values if self.is_first else None, what)[0]  # type: ignore[return-value]

    def all_gather_rows(self, rows: Tensor, what: str) -> list[Tensor]:
        """`rows [n, ...]` of every rank, by rank; n may differ between them."""
        if self.group is None:
            return [rows]
        counts = self.all_gather(rows.shape[0], f"{what}: how many")
        pieces = self.all_to_all(
            rows.repeat(self.size, *[1] * (rows.dim() - 1)), [rows.shape[0]] * self.size, counts, what
        )
        return list(pieces.split(counts))

    def mean(self, gradients: Tensor, dtype: torch.dtype | None) -> torch.futures.Future[Tensor]:
        """`gradients`, in place, the mean over all ranks, summed in `dtype` (None: their own); a hook of DDP."""
        sent = (gradients / self.size).to(gradients.dtype if dtype is None else dtype)
        work = dist.all_reduce(sent, group=self.group, async_op=True)
        assert work is not None
        mean: torch.futures.Future[Tensor] = work.get_future().then(lambda _: gradients.copy_(sent))
        return mean

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks as FSDP2 wants them."""
        assert self.group is not None
        return DeviceMesh.from_group(self.group, device_type)

    def split(self, groups: Sequence[Sequence[int]]) -> World:
        """The world of the group that this rank is in.

        Args:
            groups: lists of ranks of the whole world, the same on all ranks; each rank is in one of them.
        """
        if self.group is None:
            return self
        backend, me, mine = dist.get_backend_config(self.group), dist.get_rank(), self
        for ranks in groups:  # every process takes part in the making of every group
            with self.watch("making of process groups"):
                group = dist.new_group(list(ranks), backend=backend)
            if me in ranks:
                mine = replace(self, rank=list(ranks).index(me), size=len(ranks), group=group, groups=tuple(groups))
        return mine

    def twin(self) -> World:
        """The same ranks with a group of their own: a thread may use it while another uses this one."""
        return self.split(self.groups or [range(self.size)])


ALONE = World()


def asked_size() -> int:
    """How many processes the launcher says there are (WORLD_SIZE)."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text!r} is not a number of processes; start with torchrun, which sets it")
    return int(text)


def _asked_rank(size: int) -> int:
    text = os.environ["RANK"]
    if not text.isdigit() or int(text) >= size:
        raise ConfigError(f"RANK={text!r} with WORLD_SIZE={size}: ranks are 0 to {size - 1}; start with torchrun")
    return int(text)


@contextmanager
def open_world(device: Device, *, timeout: float, init_method: str | None = None) -> Iterator[World]:
    """The world that the launcher's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) describe.

    Args:
        timeout: seconds after which a collective counts as hung.
        init_method: as of `torch.distributed.init_process_group`.

    Raises:
        ConfigError: the variables are incomplete.
    """
    size = asked_size()
    if size == 1:
        yield ALONE
        return
    missing = [
        name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if init_method is None and name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start with torchrun, or unset WORLD_SIZE"
        )
    rank = _asked_rank(size)
    backend = "gloo" if device.is_cpu else f"cpu:gloo,{device.torch_device.type}:{device.collective_backend}"
    wait = 2 * timeout + 60  # the watchdog, which says more, comes first
    limit = timedelta(seconds=wait)
    try:
        store, _, _ = next(rendezvous(init_method or "env://", rank, size, timeout=limit))
    except dist.DistError as error:
        raise DistributedError(
            f"rank {rank} of {size}: the ranks did not find each other within {wait:g} s; is each of them started, "
            f"with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE? ({str(error).splitlines()[0]})"
        ) from error
    store = meet(store, rank, size, wait)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    group = dist.group.WORLD
    assert group is not None
    watchdog = Watchdog(rank, size, store, timeout, record=event_recorder(device.torch_device))
    try:
        recovery.started(rank, size)
        yield World(rank, size, group, watchdog=watchdog)
        recovery.ended()
    finally:
        watchdog.close()
        dist.destroy_process_group()
