"""The engine `torchrec`: tables that TorchRec shards and FBGEMM updates, beside the native ones.

A `TorchRecTable` reaches the rows of all ranks by itself, so that its `EmbeddingCollection` is that of a rank alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from npu_rec.device import get_device
from npu_rec.distributed import World
from npu_rec.embedding.placement import BlockPlacement
from npu_rec.embedding.table import EmbeddingTable, Part, TableSpec
from npu_rec.embedding.torchrec_sharding import (
    TorchRecPlacement,
    check_optimizer,
    check_tables,
    inner_name,
    library,
    padded,
    shard,
    stretch,
)
from npu_rec.errors import ConfigError
from npu_rec.ops import RowOptimizer

_ROWS_AT_ONCE = 1 << 16


def torchrec_tables(specs: Sequence[TableSpec], placement: TorchRecPlacement, world: World) -> list[EmbeddingTable]:
    """The tables of a model on the ranks of a world.

    Args:
        placement: of all tables; `auto`: TorchRec's planner chooses between rows and whole tables.

    Raises:
        ConfigError: TorchRec is not installed, or has no such tables.
    """
    library("torchrec.distributed")
    check_tables(list(specs), placement)
    return list(_Together(list(specs), placement, world).tables)


class TorchRecTable(EmbeddingTable):
    """A table in TorchRec's hands. Its memory is there from the first use of its rows on, which is collective.

    Without an optimizer the rows are read, not trained. `lr` of the optimizer is taken at the lookup.
    """

    needs_plan = True

    def __init__(self, spec: TableSpec, together: _Together) -> None:
        assert spec.num_rows is not None
        super().__init__(spec, BlockPlacement("replicated", spec.num_rows, spec.dim, 1), 0, "auto")
        self._together = together
        self._at: Tensor
        self.register_buffer("_at", torch.empty(0), persistent=False)  # goes where the module is moved

    @property
    def at(self) -> torch.device:
        """Where the rows are, or will be."""
        return self._at.device

    def plan(self, ids: Tensor, counts: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The distinct ids, and of each of `ids [R]` its place among them: equal ids travel once."""
        return torch.unique(ids, return_inverse=True)  # type: ignore[no-any-return]

    def rows(self, slots: Tensor, changes: Tensor) -> Tensor:
        """`slots [U]`, `changes [R]` of `plan` -> `[R, D]`. The backward pass, which updates them, is collective too.

        Raises:
            ConfigError: the rows are to be trained, without an optimizer.
        """
        collection, name = self._together.collection(self), inner_name(self.spec.name)
        if torch.is_grad_enabled():
            self._take_learning_rate(collection)
        keyed = library("torchrec.sparse.jagged_tensor").KeyedJaggedTensor(
            keys=[name], values=slots, lengths=torch.tensor([slots.shape[0]], device=slots.device)
        )
        with self._together.world.watch(f"rows of table {self.spec.name} by TorchRec"):
            arrived: Tensor = collection(keyed)[name].values()  # [U, columns in FBGEMM]
        if arrived.requires_grad:
            arrived.register_hook(self._gradient)
        return embedding(changes.to(slots.device), arrived[:, : self.spec.dim])

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        distinct, places = torch.unique(ids, return_inverse=True)
        return self.rows(distinct.to(self.at), places)

    def use(self, optimizer: RowOptimizer) -> None:
        self._together.use(self.spec.name, optimizer)
        self.optimizer = optimizer

    def shards(self) -> dict[str, Part]:
        assert self.spec.num_rows is not None
        collection, name = self._together.collection(self), inner_name(self.spec.name)
        key = f"embeddings.{name}.weight"
        whole = (self.spec.num_rows, self.spec.dim)
        weight = self._part(collection.state_dict()[key], whole)
        parts = {"weight": weight}
        if self.optimizer is not None and self.optimizer.name == "rowwise_adagrad":
            state = collection.fused_optimizer.state_dict()["state"].get(key, {})
            parts["square"] = self._part(state.get(f"{name}.momentum1"), whole[:1])
        return parts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every row its initial value."""
        values, (row, column), _ = self.shards()["weight"]
        for start in range(0, values.shape[0], _ROWS_AT_ONCE):
            ids = torch.arange(row + start, row + min(start + _ROWS_AT_ONCE, values.shape[0]))
            initial = self.spec.initial_rows(ids)[:, column : column + values.shape[1]]
            values[start : start + len(ids)] = initial.to(values)

    def _part(self, sharded: Any, whole: tuple[int, ...]) -> Part:
        """This rank's block of one of TorchRec's sharded tensors, without what was filled up."""
        pieces = [] if sharded is None else sharded.local_shards()
        if not pieces:  # another rank has the table
            return torch.zeros((0, *whole[1:]), device=self.at), (0,) * len(whole), whole
        (piece,) = pieces
        offset = tuple(min(o, n) for o, n in zip(piece.metadata.shard_offsets, whole, strict=True))
        block = tuple(slice(0, n - o) for o, n in zip(offset, whole, strict=True))
        return piece.tensor.detach()[block], offset, whole

    def _take_learning_rate(self, collection: Any) -> None:
        if self.optimizer is None:
            raise ConfigError("embedding.engine torchrec trains with sgd or rowwise_adagrad; set embedding.optimizer")
        for group in collection.fused_optimizer.param_groups:
            group["lr"] = self.optimizer.lr / self._together.stretch(self.spec)
        collection.fused_optimizer.step()  # hands it to the kernel, which has it from the lookup on; no row changes

    def _gradient(self, gradient: Tensor) -> Tensor:
        """Undo that TorchRec divides by the number of ranks: their losses are parts of one sum."""
        assert self.optimizer is not None
        self.optimizer.step += 1
        return gradient * (self._together.world.size * self._together.stretch(self.spec))


class _Together:
    """What the tables of a model have in common: their parts are placed at once, as soon as all is known."""

    def __init__(self, specs: list[TableSpec], placement: TorchRecPlacement, world: World) -> None:
        self.placement, self.world = placement, world
        self.tables = [TorchRecTable(spec, self) for spec in specs]
        self._collections: dict[str, Any] = {}

    def use(self, name: str, optimizer: RowOptimizer) -> None:
        """Check that the rows of a table can be updated so."""
        check_optimizer(optimizer, self.placement)
        if self._collections:
            raise RuntimeError(f"table {name}: the optimizer must be known before the rows are read")

    def stretch(self, spec: TableSpec) -> float:
        """See `torchrec_sharding.stretch`."""
        return stretch(spec.dim, padded(spec.dim, self.placement, self.world.size))

    def collection(self, table: TorchRecTable) -> Any:
        """TorchRec's module of a table; the first call makes those of all, with their initial rows."""
        if not self._collections:
            at = table.at
            if at.type not in ("cpu", "cuda"):
                raise ConfigError(f"embedding.engine torchrec: TorchRec knows cpu and cuda; on {at.type} use native")
            optimizers = {t.spec.name: t.optimizer for t in self.tables if t.optimizer is not None}
            specs = [t.spec for t in self.tables]
            device = get_device("cpu" if at.type == "cpu" else "cuda")
            with self.world.watch("placement of tables by TorchRec"):
                self._collections = shard(specs, optimizers, self.world, device, at, self.placement)
            for each in self.tables:
                each.reset_parameters()
        return self._collections[inner_name(table.spec.name)]
