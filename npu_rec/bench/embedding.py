"""`embedding_lookup`: with a gradient of the table, and with its update in the backward pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from npu_rec.bench.harness import COPIES, Contender, Row, compare, usable
from npu_rec.device import Device
from npu_rec.ops import RowOptimizer, embedding_lookup
from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest


def run(device: Device, repeats: int) -> list[Row]:
    """Lookups with a gradient of the table, then lookups that update it."""
    at = device.torch_device
    rows = []
    for count, dim, total in ((3_417, 50, 25_000), (1_000_000, 64, 65_536)):
        shape = f"V={count} D={dim} T={total}"
        table = torch.randn(count, dim, device=at).requires_grad_()
        all_ids = [_frequent_ids(count, total).to(at) for _ in range(COPIES)]
        backends = usable("embedding_lookup", EmbeddingLookupRequest(table, all_ids[0]))
        contenders = [Contender("PyTorch, dense gradient", lambda ids, table: embedding(ids, table), (table,))]
        contenders += [Contender(backend, partial(_lookup, backend, None), (table,)) for backend in backends]
        updating = [_sparse_adagrad(table), *(_rowwise_adagrad(backend, table) for backend in (*backends, "reference"))]
        for case, those in ((shape, contenders), (f"{shape} with update", updating)):
            inputs = [(ids,) for ids in all_ids]
            rows += compare("embedding", case, those, inputs, device, repeats=repeats, table_rows=total)
    return rows


def _frequent_ids(count: int, total: int) -> Tensor:
    """`[total]` ids below `count`: the r-th most frequent one about 1 / r as often as the first (Zipf)."""
    rank = (torch.rand(total, dtype=torch.float64) * torch.tensor(count + 1.0).log()).exp().long() - 1
    return torch.randperm(count)[rank.clamp(0, count - 1)]


def _lookup(backend: str, optimizer: RowOptimizer | None, ids: Tensor, table: Tensor) -> Tensor:
    return embedding_lookup(table, ids, optimizer=optimizer, backend=backend)


def _rowwise_adagrad(backend: str, table: Tensor) -> Contender:
    """The update happens in the backward pass of the lookup."""
    own = table.detach().clone().requires_grad_()
    call = partial(_lookup, backend, RowOptimizer("rowwise_adagrad", 0.01))
    return Contender(f"{backend}, rowwise_adagrad", call, (own,), learn=Tensor.backward)


def _sparse_adagrad(table: Tensor) -> Contender:
    """A sparse gradient, then PyTorch's Adagrad, which has no row-wise form: it keeps a sum for each element."""
    own = table.detach().clone().requires_grad_()
    optimizer = torch.optim.Adagrad([own], lr=0.01)

    def learn(out: Tensor, grad: Tensor) -> None:
        out.backward(grad)
        with torch.sparse.check_sparse_tensor_invariants(enable=False):  # as is the default; said, it does not warn
            optimizer.step()
        optimizer.zero_grad()

    name = "PyTorch, sparse gradient + elementwise Adagrad"
    return Contender(name, lambda ids, table: embedding(ids, table, sparse=True), (own,), learn)
