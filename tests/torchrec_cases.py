"""The engine torchrec: rows and losses of a plain computation and of the native engine, on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_rec.bench import embedding
from npu_rec.device import get_device
from npu_rec.distributed import World, open_world
from npu_rec.embedding import EmbeddingCollection, EmbeddingTable, StaticTable, TableSpec
from npu_rec.embedding.placement import BlockPlacement
from npu_rec.embedding.torchrec_engine import torchrec_tables
from npu_rec.embedding.torchrec_sharding import TorchRecPlacement, check_optimizer
from npu_rec.errors import ConfigError
from npu_rec.ops import RowOptimizer
from npu_rec.ops.row_optimizer import RowOptimizerName
from npu_rec.train import load_run_config
from npu_rec.train import train as train_model

installed = pytest.mark.skipif(find_spec("torchrec") is None, reason="torchrec is not installed (docs/scale.md)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:fbgemm_gpu.*")
processes = multiprocessing.get_context("forkserver")  # PyTorch and TorchRec are imported once, not by every rank
processes.set_forkserver_preload(
    ["npu_rec.train", "torch._dynamo", "torchrec.distributed.model_parallel", "torchrec.distributed.planner"]
)

# widths that FBGEMM wants padded, and one that it does not; `few` has rows for only some of four ranks
SPECS = [TableSpec("items", 37, 6, seed=1, std=0.5), TableSpec("few", 5, 8, seed=1), TableSpec("tags", 20, 6, seed=2)]
STEPS, HALF, EPS, PARTS = 10, 4, 1e-3, 4
CASES: list[tuple[TorchRecPlacement, RowOptimizerName]] = [
    ("row_wise", "sgd"),
    ("row_wise", "rowwise_adagrad"),
    ("table_wise", "rowwise_adagrad"),
    ("column_wise", "sgd"),
    ("auto", "rowwise_adagrad"),
]
Blocks = dict[str, tuple[Tensor, tuple[int, ...]]]  # `<table>/<part>`: values, where they begin


def lr_of(step: int) -> float:
    return 0.5 / (step + 1)


def batch(step: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Ids `[n]`, many of them equal, and targets `[n, D]` of each quarter of the global batch, some of them empty."""
    generator = torch.Generator().manual_seed(step)
    parts = {}
    for spec in SPECS:
        if spec.name == "tags" and step == 3:
            continue  # not every step reads every table
        assert spec.num_rows is not None
        lengths = [(part + step) % 3 * 9 for part in range(PARTS)]
        parts[spec.name] = [
            (torch.randint(spec.num_rows, (n,), generator=generator), torch.randn(n, spec.dim, generator=generator))
            for n in lengths
        ]
    return parts


def train(tables: EmbeddingCollection, rank: int, size: int, first: int, last: int) -> list[float]:
    """This rank's shares of the losses of steps: squared distances over the tokens of the global batch."""
    losses = []
    for step in range(first, last):
        for table in tables.tables.values():
            assert table.optimizer is not None
            table.optimizer.lr = lr_of(step)
        parts = batch(step)
        own = {name: x[rank * PARTS // size : (rank + 1) * PARTS // size] for name, x in parts.items()}
        rows = tables.lookup(tables.plan({name: torch.cat([ids for ids, _ in x]) for name, x in own.items()}))
        tokens = sum(len(ids) for x in parts.values() for ids, _ in x)
        distances = [(rows[name] - torch.cat([y for _, y in x])).square().sum() for name, x in own.items()]
        loss = torch.stack(distances).sum() / tokens
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


def plain(name: RowOptimizerName) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, rows and sums of squares in float64, by the equations of `RowOptimizer`."""
    rows = {spec.name: spec.initial_rows(torch.arange(spec.num_rows or 0)).double() for spec in SPECS}
    sums = {table: torch.zeros(len(x), dtype=torch.float64) for table, x in rows.items()}
    losses = []
    for step in range(STEPS):
        parts = {table: [torch.cat(x) for x in zip(*p, strict=True)] for table, p in batch(step).items()}
        tokens = sum(len(ids) for ids, _ in parts.values())
        losses.append(sum(float((rows[t][ids] - y).square().sum()) for t, (ids, y) in parts.items()) / tokens)
        for table, (ids, y) in parts.items():
            g = torch.zeros_like(rows[table]).index_add_(0, ids, 2 * (rows[table][ids] - y) / tokens)
            if name == "rowwise_adagrad":
                sums[table] += g.square().mean(1)
                g = g / (sums[table].sqrt() + EPS).unsqueeze(1)
            rows[table] -= lr_of(step) * g
    return losses, rows, sums


def make(placement: TorchRecPlacement, name: RowOptimizerName, world: World) -> EmbeddingCollection:
    tables = torchrec_tables(SPECS, placement, world)
    for table in tables:
        table.use(RowOptimizer(name, lr=1.0, eps=EPS))
    return EmbeddingCollection(tables)


def blocks(tables: EmbeddingCollection) -> Blocks:
    parts = ((f"{t}/{part}", x) for t, table in tables.tables.items() for part, x in table.shards().items())
    return {key: (values.clone(), offset) for key, (values, offset, _) in parts}


def load(tables: EmbeddingCollection, halves: list[Blocks]) -> None:
    """What the ranks of another run left."""
    for name, table in tables.tables.items():
        for part, (values, offset, shape) in table.shards().items():
            whole = together([half[f"{name}/{part}"] for half in halves], shape)
            values.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))])


def together(parts: list[tuple[Tensor, tuple[int, ...]]], shape: tuple[int, ...]) -> Tensor:
    """A tensor from its blocks, NaN where there is none."""
    whole = torch.full(shape, float("nan"))
    for values, offset in parts:
        whole[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return whole


def results_of(folder: Path, case: str) -> list[Any]:
    """What `rank_process` saved of a case, by rank: tensors and plain values, by the loader that takes no other."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{case}-*.pt"))]


def rank_process(rank: int, size: int, folder: Path, before: Path | None) -> None:
    """All cases on one of `size` ranks; with `before` also the second half alone, from where the ranks there were."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    with open_world(get_device("cpu"), timeout=60, init_method=f"file://{folder / 'store'}") as world:
        for placement, name in CASES:
            tables = make(placement, name, world)
            file = f"{placement}-{name}"
            losses = train(tables, rank, size, 0, HALF)
            half = blocks(tables)
            losses += train(tables, rank, size, HALF, STEPS)
            own = torch.arange(rank, 37, size)  # each rank asks for other rows
            result = {"losses": losses, "half": half, "end": blocks(tables), "read": tables.read("items", own)}
            if before is not None:
                resumed = make(placement, name, world)
                load(resumed, [result["half"] for result in results_of(before, file)])
                result["resumed"] = train(resumed, rank, size, HALF, STEPS)
            torch.save(result, folder / f"{file}-{rank}.pt")


def start(main: Callable[..., None], size: int, *arguments: object) -> None:
    """`main(rank, size, *arguments)` in as many processes."""
    running = [processes.Process(target=main, args=(rank, size, *arguments), daemon=True) for rank in range(size)]
    for process in running:
        process.start()
    try:
        end = time.monotonic() + 120
        for process in running:
            process.join(max(0.0, end - time.monotonic()))
        assert [process.exitcode for process in running] == [0] * size  # None: it took too long
    finally:
        for process in running:
            process.kill()
            process.join()


def run_ranks(folder: Path, size: int, before: Path | None = None) -> Path:
    start(rank_process, size, folder, before)
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What 1, 2 and 4 ranks left; the four go on from the half of the two."""
    two = run_ranks(tmp_path_factory.mktemp("two"), 2)
    return {
        1: run_ranks(tmp_path_factory.mktemp("one"), 1, two),
        2: two,
        4: run_ranks(tmp_path_factory.mktemp("four"), 4, two),
    }


@installed
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("placement", "name"), CASES)
def test_equals_plain_computation(
    ranks: dict[int, Path], size: int, placement: TorchRecPlacement, name: RowOptimizerName
) -> None:
    losses, rows, sums = plain(name)
    results = results_of(ranks[size], f"{placement}-{name}")
    assert len(results) == size
    torch.testing.assert_close(total(results, "losses"), torch.tensor(losses), rtol=2e-6, atol=0.0)
    for table, expected in rows.items():
        found = together([result["end"][f"{table}/weight"] for result in results], tuple(expected.shape))
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
        if name == "rowwise_adagrad":
            found = together([result["end"][f"{table}/square"] for result in results], tuple(sums[table].shape))
            torch.testing.assert_close(found, sums[table].float(), rtol=1e-5, atol=0.0)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["read"], rows["items"][rank::size].float(), rtol=1e-5, atol=1e-6)
    if size != 2:
        torch.testing.assert_close(total(results, "resumed"), torch.tensor(losses[HALF:]), rtol=2e-6, atol=0.0)


def total(results: list[dict[str, list[float]]], key: str) -> Tensor:
    """Losses of all ranks together."""
    return torch.tensor([result[key] for result in results]).sum(0)


@installed
@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad"])
def test_equals_native(ranks: dict[int, Path], name: RowOptimizerName) -> None:
    tables: list[EmbeddingTable] = []
    for spec in SPECS:
        assert spec.num_rows is not None
        tables.append(StaticTable(spec, BlockPlacement("row_wise", spec.num_rows, spec.dim, 1)))
        tables[-1].use(RowOptimizer(name, lr=1.0, eps=EPS))
    native = torch.tensor(train(EmbeddingCollection(tables), 0, 1, 0, STEPS))
    results = results_of(ranks[2], f"row_wise-{name}")
    torch.testing.assert_close(total(results, "losses"), native, rtol=2e-6, atol=0.0)


@installed
@pytest.mark.parametrize(
    ("placement", "shapes"),
    [
        ("row_wise", [((3, 8), (0, 0)), ((2, 8), (3, 0))]),
        ("table_wise", [((0, 8), (0, 0)), ((5, 8), (0, 0))]),  # the second table is the second rank's
        ("column_wise", [((5, 4), (0, 0)), ((5, 4), (0, 4))]),
    ],
)
def test_parts_lie_as_the_native_ones(
    ranks: dict[int, Path], placement: TorchRecPlacement, shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    name = "sgd" if placement == "column_wise" else "rowwise_adagrad"
    results = [result["end"]["few/weight"] for result in results_of(ranks[2], f"{placement}-{name}")]
    assert [(tuple(values.shape), offset) for values, offset in results] == shapes
    blocks = [BlockPlacement(placement, 5, 8, 2, owner=1).block(rank) for rank in range(2)]  # type: ignore[arg-type]
    assert [shape for shape, _ in shapes] == [(block.rows, block.columns) for block in blocks]


def train_process(rank: int, size: int, folder: Path, shop: Path, overrides: list[str]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), **address)
    train_model(load_run_config(shop, overrides), run_dir=folder / "run")


@installed
@pytest.mark.parametrize("dim", [16, 18])
def test_trainer_reports_the_losses_of_native(shop: Path, tmp_path: Path, dim: int) -> None:
    overrides = ["embedding.optimizer=rowwise_adagrad", "embedding.lr=0.05", f"model.embedding_dim={dim}"]
    overrides += ["model.dropout=0.2", "model.input_dropout=0.2", "train.epochs=3", "train.max_steps=10"]
    train_model(load_run_config(shop, overrides), run_dir=tmp_path / "native")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    start(train_process, 2, tmp_path, shop, [*overrides, "embedding.engine=torchrec"])
    native, found = losses_of(tmp_path / "native"), losses_of(tmp_path / "run")
    assert len(native) == 10
    torch.testing.assert_close(found, native, rtol=1e-6, atol=0.0)


def losses_of(run: Path) -> Tensor:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["loss"] for line in lines if line["split"] == "train" and "epoch_loss" not in line])


def alone(rank: int, size: int) -> None:
    """Run by `test_rows_can_be_read_without_an_optimizer`."""
    tables = EmbeddingCollection(torchrec_tables(SPECS, "row_wise", World()))
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(tables.read("few", ids), SPECS[1].initial_rows(ids))
    assert tables.read("few", ids[:0]).shape == (0, 8)
    plan = tables.plan({"few": ids})
    with pytest.raises(ConfigError, match=r"set embedding\.optimizer"):
        tables.lookup(plan)
    with torch.no_grad():
        assert torch.equal(tables.lookup(plan)["few"], SPECS[1].initial_rows(ids))
    with pytest.raises(IndexError, match="out of range of 5 rows"):
        tables.plan({"few": torch.tensor([5])})
    with pytest.raises(RuntimeError, match="before the rows are read"):
        tables.tables["few"].use(RowOptimizer("sgd", lr=0.1))


@installed
def test_rows_can_be_read_without_an_optimizer() -> None:
    start(alone, 1)


@pytest.mark.parametrize(
    ("placement", "optimizer", "reason"),
    [
        ("row_wise", RowOptimizer("rowwise_adam", lr=0.1), "FBGEMM has it for CUDA alone"),
        ("row_wise", RowOptimizer("sgd", lr=0.1, max_norm=1.0), r"train\.clip row"),
        ("column_wise", RowOptimizer("rowwise_adagrad", lr=0.1), "a sum for each rank's columns"),
    ],
)
def test_updates_that_fbgemm_does_not_make(placement: TorchRecPlacement, optimizer: RowOptimizer, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_optimizer(optimizer, placement)


@installed
@pytest.mark.parametrize(
    ("spec", "placement", "reason"),
    [
        (TableSpec("items", None, 6, seed=1), "row_wise", "table items is dynamic"),
        (TableSpec("items", 3, 6, seed=1), "replicated", "row_wise, table_wise, column_wise, auto"),
    ],
)
def test_tables_that_torchrec_does_not_have(spec: TableSpec, placement: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        torchrec_tables([spec], placement, World())  # type: ignore[arg-type]


def test_absence_is_one_line_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrec", None)
    monkeypatch.setitem(sys.modules, "torchrec.distributed", None)
    advice = r"pip install --no-deps torchrec==1\.8\.0, then pip install .* set embedding\.engine"
    with pytest.raises(ConfigError, match=advice) as error:
        torchrec_tables(SPECS, "row_wise", World())
    assert "\n" not in str(error.value)


def test_fbgemm_updates_a_table_as_ours_does() -> None:
    """Where it is installed; elsewhere the benchmark says that it is not."""
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    other = embedding._fbgemm(table)
    if isinstance(other, str):
        assert "FBGEMM, EXACT_ROWWISE_ADAGRAD: not timed (No module named 'fbgemm_gpu'" in other
        return
    ours = embedding._rowwise_adagrad("auto", table.clone())
    ids = torch.tensor([3, 49, 3, 7])
    for _ in range(3):
        rows = [contender.call(ids, *contender.own) for contender in (ours, other)]
        torch.testing.assert_close(rows[1], rows[0])
        for contender, out in zip((ours, other), rows, strict=True):
            assert contender.learn is not None
            contender.learn(out, torch.arange(32.0).reshape(4, 8))
