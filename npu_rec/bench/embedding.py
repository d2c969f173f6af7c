"""`embedding_lookup`: with a gradient of the table, and with its update in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import embedding

from npu_rec.bench.harness import COPIES, Contender, Row, compare, usable
from npu_rec.device import Device
from npu_rec.embedding import EmbeddingCollection, SlotTable, TableSpec
from npu_rec.embedding.placement import HashPlacement
from npu_rec.ops import RowOptimizer, embedding_lookup
from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest

LARGE = ((1_000_000, 64), (4_000_000, 128))  # rows and width of tables
_LR = 0.01
_ROWS_AT_ONCE = 1 << 18


def run(device: Device, repeats: int) -> list[Row]:
    """Lookups with a gradient of the table, then lookups that update it, then those of large tables."""
    return [*_frequent(device, repeats), *_large(device, repeats)]


def _frequent(device: Device, repeats: int) -> list[Row]:
    """Ids as users choose items: few are most of them."""
    at = device.torch_device
    rows = []
    for count, dim, total in ((3_417, 50, 25_000), (1_000_000, 64, 65_536)):
        shape = f"V={count} D={dim} T={total}"
        table = torch.randn(count, dim, device=at).requires_grad_()
        all_ids = [_frequent_ids(count, total).to(at) for _ in range(COPIES)]
        backends = usable("embedding_lookup", EmbeddingLookupRequest(table, all_ids[0]))
        contenders = [Contender("PyTorch, dense gradient", lambda ids, table: embedding(ids, table), (table,))]
        contenders += [Contender(backend, partial(_lookup, backend, None), (table,)) for backend in backends]
        own = table.detach().clone
        updating = [_sparse_adagrad(own()), *(_rowwise_adagrad(backend, own()) for backend in (*backends, "reference"))]
        for case, those in ((shape, contenders), (f"{shape} with update", updating)):
            inputs = [(ids,) for ids in all_ids]
            rows += compare("embedding", case, those, inputs, device, repeats=repeats, table_rows=total)
    return rows


def _large(device: Device, repeats: int, total: int = 20_000, steps: int = 16) -> list[Row]:
    """Any id as likely as another, new ones each step: hardly a row is in the processor's cache."""
    rows = []
    for count, dim in LARGE:
        shape = f"V={count} D={dim} T={total} uniform"
        own = partial(torch.full, (count, dim), 0.01, device=device.torch_device)
        tables = [_sparse_adagrad(own()), _rowwise_adagrad("auto", own()), _dynamic(own())]
        missing = []
        if device.is_cpu:
            fbgemm = _fbgemm(own())
            if isinstance(fbgemm, Contender):
                tables.append(fbgemm)
            else:
                missing.append(Row("embedding", fbgemm, shape, 0.0, 0.0, 0.0, None))
        inputs = [(torch.randint(count, (total,)).to(device.torch_device),) for _ in range(steps)]
        rows += compare("embedding", shape, tables, inputs, device, repeats=repeats, table_rows=total) + missing
    return rows


def _frequent_ids(count: int, total: int) -> Tensor:
    """`[total]` ids below `count`: the r-th most frequent one about 1 / r as often as the first (Zipf)."""
    rank = (torch.rand(total, dtype=torch.float64) * torch.tensor(count + 1.0).log()).exp().long() - 1
    return torch.randperm(count)[rank.clamp(0, count - 1)]


def _lookup(backend: str, optimizer: RowOptimizer | None, ids: Tensor, table: Tensor) -> Tensor:
    return embedding_lookup(table, ids, optimizer=optimizer, backend=backend)


def _rowwise_adagrad(backend: str, table: Tensor) -> Contender:
    """The update of `table` happens in the backward pass of the lookup."""
    call = partial(_lookup, backend, RowOptimizer("rowwise_adagrad", _LR))
    return Contender(f"{backend}, rowwise_adagrad", call, (table.requires_grad_(),), learn=Tensor.backward)


def _dynamic(rows: Tensor) -> Contender:
    """The same rows in a dynamic table, which looks for the row of an id first."""
    table = SlotTable(TableSpec("t", None, rows.shape[1], 0), HashPlacement(rows.shape[1], 1)).to(rows.device)
    table.use(RowOptimizer("rowwise_adagrad", _LR))
    table.load(_pieces(rows))
    collection = EmbeddingCollection([table])

    def call(ids: Tensor) -> Tensor:
        return collection.lookup({name: plan.to(rows.device) for name, plan in collection.plan({"t": ids}).items()})[
            "t"
        ]

    return Contender("dynamic, rowwise_adagrad", call, learn=Tensor.backward)


def _pieces(rows: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """All rows, by their number."""
    for ids in torch.arange(rows.shape[0]).split(_ROWS_AT_ONCE):
        weight, none = rows[ids.to(rows.device)].cpu(), torch.zeros_like(ids)
        yield ids, {"weight": weight, "last_step": none, "count": none}


def _sparse_adagrad(table: Tensor) -> Contender:
    """A sparse gradient, then PyTorch's Adagrad, which has no row-wise form: it keeps a sum for each element."""
    table.requires_grad_()
    optimizer = torch.optim.Adagrad([table], lr=_LR)

    def learn(out: Tensor, grad: Tensor) -> None:
        out.backward(grad)
        with torch.sparse.check_sparse_tensor_invariants(enable=False):  # as is the default; said, it does not warn
            optimizer.step()
        optimizer.zero_grad()

    name = "PyTorch, sparse gradient + elementwise Adagrad"
    return Contender(name, lambda ids, table: embedding(ids, table, sparse=True), (table,), learn)


def _fbgemm(table: Tensor) -> Contender | str:
    """FBGEMM's table on the CPU, without pooling, which updates itself as ours does; or why it is not there."""
    name = "FBGEMM, EXACT_ROWWISE_ADAGRAD"
    try:
        training = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    except (ImportError, OSError) as error:
        return f"{name}: not timed ({error}; pip install fbgemm-gpu-cpu)"
    where = (training.EmbeddingLocation.HOST, training.ComputeDevice.CPU)
    module = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, *where)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
        pooling_mode=training.PoolingMode.NONE,
        learning_rate=_LR,
        eps=RowOptimizer("rowwise_adagrad", _LR).eps,
    )
    module.split_embedding_weights()[0].copy_(table)
    return Contender(name, lambda ids: module(ids, torch.arange(len(ids) + 1)), learn=Tensor.backward)
