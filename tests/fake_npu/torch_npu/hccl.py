"""The process group "hccl": gloo on the same memory.

Collectives are done when a call returns, `send` and `recv` when they are waited for. The collectives that torch 2.13
renamed are there under both names. A group made for "cpu:gloo,npu:hccl" is this one too: for tensors of the CPU it is
gloo itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

Tensors = Sequence[Tensor]


def register() -> None:
    """Make "hccl" the backend of npu tensors."""
    dist.Backend.register_backend("hccl", _create, devices=["npu"])


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupHCCL:
    return ProcessGroupHCCL(store, rank, size, timeout)


def _cpu(tensor: Tensor) -> Tensor:
    alias: Tensor = torch.ops.fake_npu.cpu_alias(tensor.detach())
    return alias


def _done(outputs: Any) -> dist.Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(outputs)
    return _create_work_from_future(future)


def _average(opts: Any, size: int, outputs: Tensors) -> None:
    """gloo has no average."""
    if opts.reduceOp == dist.ReduceOp.AVG:
        for output in outputs:
            output /= size


def _summing(opts: Any, kind: type) -> Any:
    """The same options with a sum in place of an average."""
    changed = kind()
    changed.reduceOp = dist.ReduceOp.SUM if opts.reduceOp == dist.ReduceOp.AVG else opts.reduceOp
    return changed


class ProcessGroupHCCL(dist.ProcessGroup):
    """Collectives on npu tensors."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._name = ""

    def getBackendName(self) -> str:
        return "hccl"

    def _get_backend(self, device: torch.device) -> Any:
        return self._gloo

    def setGroupName(self, name: str) -> None:
        self._name = name

    _set_group_name = setGroupName

    def getGroupName(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    def broadcast(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        self._gloo.broadcast([_cpu(x) for x in tensors], opts or dist.BroadcastOptions()).wait()
        return _done(tensors)

    def allreduce(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceOptions()
        for tensor in tensors:
            self._gloo.allreduce([_cpu(tensor)], _summing(opts, dist.AllreduceOptions)).wait()
        _average(opts, self.size(), tensors)
        return _done(tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceOptions()
        summing = _summing(opts, dist.ReduceOptions)
        summing.rootRank = opts.rootRank
        self._gloo.reduce([_cpu(x) for x in tensors], summing).wait()
        if opts.rootRank == self.rank():
            _average(opts, self.size(), tensors)
        return _done(tensors)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> dist.Work:
        for targets, source in zip(outputs, inputs, strict=True):
            sizes = [target.numel() for target in targets]
            if len(set(sizes)) == 1:
                self._gloo.allgather([[_cpu(x) for x in targets]], [_cpu(source)]).wait()
                continue
            for rank, target in enumerate(targets):  # uneven parts: one broadcast each
                if rank == self.rank():
                    target.copy_(source)
                options = dist.BroadcastOptions()
                options.rootRank = rank
                self._gloo.broadcast([_cpu(target)], options).wait()
        return _done(outputs)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        self._gloo._allgather_base(_cpu(output), _cpu(source)).wait()
        return _done([output])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        for output, source in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, source)
        return _done(outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        for output, parts in zip(outputs, inputs, strict=True):
            for rank, part in enumerate(parts):  # parts may be uneven: one sum each
                total = part.clone()
                self._gloo.allreduce([_cpu(total)], _summing(opts, dist.AllreduceOptions)).wait()
                if rank == self.rank():
                    output.copy_(total)
        _average(opts, self.size(), outputs)
        return _done(outputs)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        self.reduce_scatter([output.flatten()], [source.flatten().chunk(self.size())], opts)
        return _done([output])

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        for output, source in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, source, opts)
        return _done(outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def all_to_all_single(
        self, output: Tensor, source: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> dist.Work:
        self._gloo.alltoall_base(_cpu(output), _cpu(source), output_sizes, input_sizes).wait()
        return _done([output])

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        sizes = [[x.numel() for x in tensors] for tensors in (outputs, inputs)]
        received = outputs[0].new_empty(sum(sizes[0]))
        self.all_to_all_single(received, torch.cat([x.flatten() for x in inputs]), *sizes)
        for output, part in zip(outputs, received.split(sizes[0]), strict=True):
            output.copy_(part.view(output.shape))
        return _done(outputs)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> dist.Work:
        targets = [[_cpu(x) for x in tensors] for tensors in outputs]
        self._gloo.gather(targets, [_cpu(x) for x in inputs], opts or dist.GatherOptions()).wait()
        return _done(outputs)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> dist.Work:
        sources = [[_cpu(x) for x in tensors] for tensors in inputs]
        self._gloo.scatter([_cpu(x) for x in outputs], sources, opts or dist.ScatterOptions()).wait()
        return _done(outputs)

    def send(self, tensors: Tensors, rank: int, tag: int) -> dist.Work:
        return self._gloo.send([_cpu(x) for x in tensors], rank, tag)

    def recv(self, tensors: Tensors, rank: int, tag: int) -> dist.Work:
        return self._gloo.recv([_cpu(x) for x in tensors], rank, tag)

    def barrier(self, opts: Any = None) -> dist.Work:
        self._gloo.barrier().wait()
        return _done(None)
