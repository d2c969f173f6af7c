"""Collectives, DDP, FSDP2 and DTensor over "hccl" between two fake npus; RANK, WORLD_SIZE and MEETING_POINT are set."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.device import get_device
from npu_rec.models import SequenceEncoder
from npu_rec.models.hstu import HSTUOptions
from npu_rec.ops.jagged import lengths_to_offsets

warnings.filterwarnings("ignore", category=FutureWarning)  # names that torch 2.13 gave up, tried here on purpose

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LENGTHS = [[3, 5, 0], [9, 1, 4]]  # of the sequences of each rank
device = get_device("ascend")
npu = device.torch_device


def encoder() -> SequenceEncoder:
    """The same small HSTU everywhere."""
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=16, num_blocks=2, num_heads=2, attention_dim=8, linear_dim=8, max_seq_len=16)
    return SequenceEncoder(config, HSTUOptions(), OpsConfig(), num_items=20, seed=0).to(npu)


def batch(lengths: list[int], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, 21, (sum(lengths),), generator=generator)
    times = torch.randint(0, 10**6, (sum(lengths),), generator=generator).sort().values
    offsets = lengths_to_offsets(torch.tensor(lengths))
    return tuple(x.to(npu) for x in (items, offsets, times, times + 60))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[tuple[Tensor, ...]], scale: float) -> None:
    optimizer.zero_grad()
    sum(model(*part).square().sum() * scale for part in parts).backward()
    optimizer.step()


def adamw(model: nn.Module, foreach: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=foreach)


def trained_alone(foreach: bool = True) -> SequenceEncoder:
    """Three steps of one process over the global batch."""
    model = encoder()
    optimizer = adamw(model, foreach)
    for number in range(3):
        step(model, optimizer, [batch(lengths, 10 * number + rank) for rank, lengths in enumerate(LENGTHS)], 1 / 22)
    return model


def test_collectives() -> None:
    assert dist.get_default_backend_for_device(npu) == "hccl"
    x = torch.full((3,), float(RANK + 1), device=npu)
    dist.all_reduce(x)
    assert x.tolist() == [3.0] * 3
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    y = torch.full((2,), float(RANK), device=npu)
    dist.all_reduce(y, op=dist.ReduceOp.AVG)
    assert y.tolist() == [0.5] * 2
    z = torch.full((2,), RANK, device=npu)
    work = dist.broadcast(z, src=1, async_op=True)
    work.wait()
    assert z.tolist() == [1, 1]
    dist.reduce(x, dst=0)
    assert RANK or x.tolist() == [6.0] * 3
    dist.barrier()
    received = torch.zeros(1, dtype=torch.int64, device=npu)
    other = 1 - RANK
    exchange = [
        dist.P2POp(dist.isend, torch.tensor([RANK + 7], device=npu), other),
        dist.P2POp(dist.irecv, received, other),
    ]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    assert received.item() == other + 7
    group = dist.new_group(backend="hccl")
    dist.all_reduce(received, group=group)
    assert received.item() == 15
    objects: list[object] = [None] * WORLD
    dist.all_gather_object(objects, {"rank": RANK})
    assert objects == [{"rank": 0}, {"rank": 1}]


def test_all_to_all_with_uneven_splits() -> None:
    sent = torch.arange(5 if RANK == 0 else 3, device=npu).unsqueeze(1).expand(-1, 2).contiguous() + 100 * RANK
    to, back = ([4, 1], [4, 0]) if RANK == 0 else ([0, 3], [1, 3])  # rows for each rank, rows from each rank
    received = torch.empty(sum(back), 2, dtype=torch.int64, device=npu)
    dist.all_to_all_single(received, sent, back, to)
    assert received[:, 0].tolist() == ([0, 1, 2, 3] if RANK == 0 else [4, 100, 101, 102])
    parts = [torch.empty(rank + RANK + 1, device=npu) for rank in range(WORLD)]
    dist.all_to_all(parts, [torch.full((rank + RANK + 1,), float(RANK), device=npu) for rank in range(WORLD)])
    assert [part.tolist() for part in parts] == [[0.0] * (RANK + 1), [1.0] * (RANK + 2)]


def known(place: object, new: str, old: str) -> list[Callable[..., Any]]:
    """A function under its name of torch 2.13 and its older one; the older one alone before."""
    return [getattr(place, name) for name in (new, old) if hasattr(place, name)]


def test_gather_and_scatter_under_old_and_new_names() -> None:
    mine = torch.tensor([RANK, RANK + 10], device=npu)
    for gather in known(dist, "all_gather_single", "all_gather_into_tensor"):
        whole = torch.empty(4, dtype=torch.int64, device=npu)
        gather(whole, mine)
        assert whole.tolist() == [0, 10, 1, 11]
    group = dist.group.WORLD
    for gather in known(group, "all_gather_single", "_allgather_base"):
        whole = torch.empty(4, dtype=torch.int64, device=npu)
        gather(whole, mine).wait()
        assert whole.tolist() == [0, 10, 1, 11]
    uneven = [torch.empty(rank + 1, dtype=torch.int64, device=npu) for rank in range(WORLD)]
    dist.all_gather(uneven, torch.full((RANK + 1,), RANK, device=npu))
    assert [part.tolist() for part in uneven] == [[0], [1, 1]]
    ones = torch.arange(4.0, device=npu)
    for scatter in known(dist, "reduce_scatter_single", "reduce_scatter_tensor"):
        own = torch.empty(2, device=npu)
        scatter(own, ones)
        assert own.tolist() == ([0.0, 2.0] if RANK == 0 else [4.0, 6.0])
    for scatter in known(group, "reduce_scatter_single", "_reduce_scatter_base"):
        own = torch.empty(2, device=npu)
        scatter(own, ones).wait()
        assert own.tolist() == ([0.0, 2.0] if RANK == 0 else [4.0, 6.0])
    own = torch.empty(RANK + 1, device=npu)
    dist.reduce_scatter(own, [torch.ones(1, device=npu), torch.ones(2, device=npu)], op=dist.ReduceOp.AVG)
    assert own.tolist() == [1.0] * (RANK + 1)
    dist.scatter(own := torch.empty(2, device=npu), [ones[:2], ones[2:]] if RANK == 0 else None)
    assert own.tolist() == ([0.0, 1.0] if RANK == 0 else [2.0, 3.0])
    gathered = [torch.empty(2, device=npu) for _ in range(WORLD)] if RANK == 1 else None
    dist.gather(own, gathered, dst=1)
    assert gathered is None or torch.cat(gathered).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_ddp_equals_one_process() -> None:
    model = DistributedDataParallel(encoder())
    optimizer = adamw(model, foreach=True)
    for number in range(3):
        step(model, optimizer, [batch(LENGTHS[RANK], 10 * number + RANK)], WORLD / 22)  # DDP takes the mean
    untrained, alone = encoder().state_dict(), trained_alone().state_dict()
    for name, value in model.module.state_dict().items():
        assert value.device == npu
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, untrained[name], atol=1e-3)


def test_fsdp_equals_one_process() -> None:
    mesh = init_device_mesh("npu", (WORLD,))
    model = encoder()
    device.synchronize()
    for layer in model.backbone.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert local <= 0.6 * sum(parameter.numel() for parameter in model.parameters())
    optimizer = adamw(model, foreach=False)
    for number in range(3):
        step(model, optimizer, [batch(LENGTHS[RANK], 10 * number + RANK)], WORLD / 22)
    alone = dict(trained_alone(foreach=False).named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), alone[name], rtol=1e-5, atol=1e-6)


def test_sharded_checkpoint() -> None:
    model = encoder()
    fully_shard(model, mesh=init_device_mesh("npu", (WORLD,)))
    folder = f"{os.environ['MEETING_POINT']}-checkpoint"
    checkpoint.save(model.state_dict(), storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    before = {name: value.full_tensor().clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.to_local().detach().zero_()
    checkpoint.load(model.state_dict(), storage_reader=HuggingFaceStorageReader(folder))
    for name, value in model.state_dict().items():
        assert before[name].abs().sum() > 0 or name.endswith("bias")
        assert torch.equal(value.full_tensor(), before[name])


def test_dtensor() -> None:
    mesh = init_device_mesh("npu", (WORLD,))
    whole = torch.arange(10.0, device=npu).view(5, 2)
    rows = distribute_tensor(whole, mesh, [Shard(0)])  # uneven: three rows and two
    assert rows.to_local().shape == (3 - RANK, 2)
    assert torch.equal(rows.full_tensor(), whole)
    columns = rows.redistribute(mesh, [Shard(1)])
    assert torch.equal(columns.to_local(), whole[:, RANK : RANK + 1])
    assert torch.equal(columns.redistribute(mesh, [Replicate()]).to_local(), whole)
    product = rows.t() @ rows  # each rank has a part of the sum
    assert torch.equal(product.full_tensor(), whole.T @ whole)


dist.init_process_group(
    "cpu:gloo,npu:hccl", init_method=f"file://{os.environ['MEETING_POINT']}", rank=RANK, world_size=WORLD
)
for name, test in list(globals().items()):
    if name.startswith("test_"):
        test()
        if RANK == 0:
            print(name, flush=True)
on_host = torch.ones(2)
dist.all_reduce(on_host)
assert on_host.tolist() == [2.0, 2.0]
dist.destroy_process_group()
