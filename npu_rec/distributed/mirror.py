"""A world of many ranks of which one process is built: it sees in every other rank a copy of itself.

What it sends is recorded. What it receives is what it would have sent to itself, where that has the right size;
otherwise, and for tensors without data, something of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from npu_rec.distributed.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """What one rank sends in one collective.

    Attributes:
        what: its name; op: `all_to_all`, `all_reduce`, `all_gather` or `reduce_scatter`.
        ranks: how many take part; group: the first of them and how far the next is, which tells groups apart.
        within_node, between_nodes: bytes to ranks of the same node and of others. Collectives that are not
            all_to_all are taken to be hierarchical: every byte crosses between two nodes once, by one card of each.
        on_host: tensors of the host (gloo).
    """

    what: str
    op: str
    ranks: int
    group: tuple[int, int]
    within_node: float
    between_nodes: float
    on_host: bool


@dataclass(frozen=True)
class Mirror(World):
    """`rank` of `size` ranks, the others imagined.

    Attributes:
        members: ranks of the whole world that this one stands among.
        ranks_per_node: neighbouring ranks of the whole world are on one node, so many.
        record: takes every message.
        on_host: whether a tensor is one of the host.
    """

    members: tuple[int, ...] = ()
    ranks_per_node: int = 1
    record: Callable[[Message], None] = field(default=lambda message: None, repr=False)
    on_host: Callable[[Tensor], bool] = field(default=lambda tensor: True, repr=False)
    device_mesh: DeviceMesh | None = field(default=None, repr=False)

    real = False

    @property
    def _group(self) -> tuple[int, int]:
        return self.members[0], self.members[1] - self.members[0] if self.size > 1 else 0

    @property
    def _neighbours(self) -> int:
        """Members on this rank's node, itself too."""
        node = self.members[self.rank] // self.ranks_per_node
        return sum(member // self.ranks_per_node == node for member in self.members)

    def sent(self, what: str, op: str, size: float, on_host: bool) -> None:
        """Record a collective whose whole, on one rank, has `size` bytes; an all_reduce is two of half the work."""
        here = self._neighbours
        nodes = self.size / here
        times = 2 if op == "all_reduce" else 1
        within, between = times * size * (here - 1) / here, times * size / here * (nodes - 1) / nodes
        self.record(Message(what, op, self.size, self._group, within, between, on_host))

    def all_reduce(self, values: Tensor, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        self.sent(what, "all_reduce", values.nbytes, self.on_host(values))
        return values

    def all_to_all(self, send: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], what: str) -> Tensor:
        each = send.nbytes / max(1, send.shape[0])
        node = self.members[self.rank] // self.ranks_per_node
        within = between = 0.0
        for member, count in zip(self.members, send_counts, strict=True):
            if member != self.members[self.rank]:
                near = member // self.ranks_per_node == node
                within, between = within + each * count * near, between + each * count * (not near)
        self.record(Message(what, "all_to_all", self.size, self._group, within, between, self.on_host(send)))
        own = send.split(list(send_counts))[self.rank]
        if all(count == own.shape[0] for count in receive_counts):
            mirrored: Tensor = own.repeat(self.size, *[1] * (own.dim() - 1))
            return mirrored
        return send.new_zeros((sum(receive_counts), *send.shape[1:]))

    def all_gather(self, values: T, what: str) -> list[T]:
        return [values] * self.size

    def mean(self, gradients: Tensor, dtype: torch.dtype | None) -> torch.futures.Future[Tensor]:
        sent = gradients if dtype is None else (gradients / self.size).to(dtype)
        self.sent("gradients", "all_reduce", sent.nbytes, False)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradients if dtype is None else gradients.copy_(sent))
        return done

    def mesh(self, device_type: str) -> DeviceMesh:
        assert self.device_mesh is not None
        return self.device_mesh

    def split(self, groups: Sequence[Sequence[int]]) -> World:
        me = self.members[self.rank]
        mine = next(tuple(ranks) for ranks in groups if me in ranks)
        return replace(self, rank=mine.index(me), size=len(mine), members=mine, groups=tuple(groups))


def open_mirror(
    rank: int,
    size: int,
    ranks_per_node: int,
    record: Callable[[Message], None],
    on_host: Callable[[Tensor], bool],
) -> Mirror:
    """Rank `rank` of `size` in a process group that PyTorch fakes; `close_mirror` ends it."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    group = dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, "cpu")
    return Mirror(
        rank,
        size,
        group,
        members=tuple(range(size)),
        ranks_per_node=ranks_per_node,
        record=record,
        on_host=on_host,
        device_mesh=mesh,
    )


def close_mirror() -> None:
    """End the group of `open_mirror`."""
    dist.destroy_process_group()
