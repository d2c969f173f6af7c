"""Checkpoints that several ranks write and that any number of ranks read."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import assert_rows, documents, rows_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardOf

from npu_rec.distributed.world import World
from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint import (
    AsyncSaver,
    Keyed,
    Shard,
    Snapshot,
    agreement,
    apply_delta,
    delta_snapshot,
    disk,
    list_steps,
    open_checkpoint,
    open_delta,
    remove_partial,
    save_snapshot,
    tensor_files,
)

processes = multiprocessing.get_context("forkserver")  # PyTorch is imported once, not by every rank
processes.set_forkserver_preload(["npu_rec.train.checkpoint"])


def _rank(work: Callable[..., None], rank: int, size: int, meeting: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    work(World(rank, size, dist.group.WORLD), *arguments)
    dist.destroy_process_group()


def on_ranks(size: int, meeting: Path, work: Callable[..., None], *arguments: Any, seconds: float = 60.0) -> list[int]:
    """Run `work(world, *arguments)` on `size` ranks; their exit codes, or a failure when they take too long."""
    ranks = [processes.Process(target=_rank, args=(work, rank, size, meeting, arguments)) for rank in range(size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    assert not late, f"ranks {late} did not end within {seconds} s"
    return [process.exitcode or 0 for process in ranks]


def whole_tensors() -> dict[str, Tensor]:
    """What all ranks together have."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.items.weight": torch.randn(11, 3, generator=generator),  # 11 rows are never even
        "model.columns.weight": torch.randn(4, 7, generator=generator),
        "model.one.weight": torch.randn(1, 2, generator=generator),  # the second rank has no row
        "model.nothing.weight": torch.empty(0, 3),
        "model.twice": torch.randn(4, 2, generator=generator).bfloat16(),
        "model.dense": torch.randn(5, 4, generator=generator),
        "model.bias": torch.randn(6, generator=generator),
        "optimizer.items.weight/square": torch.rand(11, generator=generator, dtype=torch.float64),
        "optimizer.dense/step": torch.tensor(9.0),
        "random.host": torch.arange(40, dtype=torch.uint8),
    }


def cut(size: int, rank: int, ranks: int) -> slice:
    """The rank's part of `size` rows, the first ranks one more."""
    return slice((size * rank + ranks - 1) // ranks, (size * (rank + 1) + ranks - 1) // ranks)


def held(world: World, empty: bool = False) -> dict[str, Tensor | Shard]:
    """What a rank has of `whole_tensors()`, or, `empty`, room for it."""
    tensors = {name: torch.full_like(t, 3) if empty else t for name, t in whole_tensors().items()}

    def shard(name: str, dim: int) -> Shard:
        part = cut(tensors[name].shape[dim], world.rank, world.size)
        local = tensors[name].narrow(dim, part.start, part.stop - part.start)
        offsets = [0] * local.dim()
        offsets[dim] = part.start
        return Shard(local, tuple(offsets), tuple(tensors[name].shape))

    mesh = init_device_mesh("cpu", (world.size,))
    return {
        **tensors,
        **{name: shard(name, 0) for name in tensors if name.endswith((".weight", "/square"))},
        "model.columns.weight": shard("model.columns.weight", 1),
        "model.twice": Shard(tensors["model.twice"], (0, 0), (4, 2)),
        "model.dense": distribute_tensor(tensors["model.dense"], mesh, [ShardOf(0)]),
        "model.bias": distribute_tensor(tensors["model.bias"], mesh, [Replicate()]),
    }


USERS = torch.tensor([-(2**63), -7, 0, 4, 5, 19, 2**40, 2**63 - 1])


def keyed(world: World) -> dict[str, Any]:
    """The second rank alone has users; the first streams its rows."""

    def stream() -> Iterator[Keyed]:
        for start in range(0, 30, 7):
            yield rows_of(torch.arange(start, min(start + 7, 30)))

    none = torch.empty(0, dtype=torch.int64)
    return {
        "model.users": rows_of(USERS if world.rank == 1 else none),
        "model.single": rows_of(torch.tensor([world.rank])),
        "model.streamed": stream() if world.rank == 0 else iter(()),
        "model.unused": rows_of(none),
    }


def refused(world: World, save: Callable[[], None]) -> str:
    """The message with which all ranks refuse to save."""
    with pytest.raises(CheckpointError) as raised:
        save()
    (message,) = set(world.all_gather(str(raised.value), "messages"))
    return message


def nothing_is_left(world: World, folder: Path) -> None:
    world.barrier("removed by the first rank")
    assert not list(folder.glob(".*"))
    world.barrier("before its next save")


def write(world: World, folder: Path) -> None:
    torch.manual_seed(0)
    save_snapshot(folder / "step-10", Snapshot(held(world), keyed(world), documents(10)), world)
    assert list_steps(folder) == [10]
    while_training_goes_on(world, folder)
    with_a_full_disk(world, folder)
    with_blocks_that_do_not_fit(world, folder)
    with_a_mistake_on_one_rank(world, folder)
    with_a_slow_disk(world)
    mine = torch.tensor([2, 5] if world.rank == 0 else [10])
    rows = {
        "model.items": Keyed(mine, {"weight": mine.unsqueeze(1).repeat(1, 3).float()}),
        "model.users": rows_of(mine),
    }
    delta = delta_snapshot(tensors={"model.bias": torch.zeros(6)}, keyed=rows, mark_step=10, step=15)
    save_snapshot(folder / "delta-15", delta, world)


def while_training_goes_on(world: World, folder: Path) -> None:
    gate, write_blocks = threading.Event(), tensor_files.write_blocks

    def slow(*arguments: Any) -> str:
        assert gate.wait(30)
        return write_blocks(*arguments)

    tensors, users = held(world), rows_of(USERS + 0 if world.rank == 1 else USERS[:0])
    tensor_files.write_blocks = slow
    saver = AsyncSaver(world)
    saver.save(folder / "step-20", Snapshot(tensors, {"model.users": users}, documents(20)))
    for value in tensors.values():
        Shard.of(value).local.fill_(77)
    users.columns["weight"].fill_(77)
    users.keys.fill_(77)
    for _ in range(5):
        assert world.all_reduce(torch.ones(1), "training").item() == 2
    assert list_steps(folder) == [10]
    gate.set()
    saver.wait()
    tensor_files.write_blocks = write_blocks
    assert list_steps(folder) == [10, 20]


def with_a_full_disk(world: World, folder: Path) -> None:
    big = torch.ones(64, 1024)
    snapshot = Snapshot(
        {"model.big": Shard(big, (64 * world.rank, 0), (128, 1024))},
        {"model.keyed": Keyed(torch.arange(64), {"weight": big})},
        documents(30),
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the disk takes no more bytes of a file
    path, saver = folder / "step-30", AsyncSaver(world)
    in_the_call = refused(world, lambda: save_snapshot(path, snapshot, world))
    saver.save(path, snapshot)
    assert refused(world, saver.wait) == in_the_call
    saver.save(path, snapshot)
    assert refused(world, lambda: saver.save(path, snapshot)) == in_the_call
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert in_the_call == (
        f"{path}: cannot be written: [Errno 27] File too large; earlier checkpoints are untouched (on rank 1)"
    )
    nothing_is_left(world, folder)


def with_blocks_that_do_not_fit(world: World, folder: Path) -> None:
    path = folder / "step-30"
    hole = Shard(torch.ones(2, 2), (3 * world.rank, 0), (5, 2))
    assert "model.x: the blocks of all ranks have 8 elements, [5, 2] has 10" in refused(
        world, lambda: save_snapshot(path, Snapshot({"model.x": hole}), world)
    )
    other = Shard(torch.ones(2, 2), (2 * world.rank, 0), (4 + world.rank, 2))
    assert "model.x: ranks differ in its shape: [4, 2] and [5, 2]" in refused(
        world, lambda: save_snapshot(path, Snapshot({"model.x": other}), world)
    )
    nothing_is_left(world, folder)


def with_a_mistake_on_one_rank(world: World, folder: Path) -> None:
    """The others are told; where it arose it keeps its traceback."""
    wrong: Any = {"model.x": "no tensor"} if world.rank == 1 else {"model.x": torch.ones(1)}
    with pytest.raises(AttributeError if world.rank == 1 else CheckpointError, match="'str' object has no attribute"):
        save_snapshot(folder / "step-30", Snapshot(wrong), world)
    names = {f"model.{world.rank}": rows_of(USERS)}
    with pytest.raises(CheckpointError, match=r"rows by key of rank . are \['model\..'\], here"):
        save_snapshot(folder / "step-30", Snapshot({}, names), world)
    nothing_is_left(world, folder)


def with_a_slow_disk(world: World) -> None:
    """A rank that writes for long goes on meeting the others, so that nobody waits long in a collective."""
    rounds: list[str] = []
    enough = threading.Event()

    class Counts:
        timeout = 0.2

        @contextmanager
        def section(self, what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
            rounds.append(what)
            yield
            if len(rounds) >= 3:
                enough.set()

    def work() -> int:
        return world.rank if world.rank == 0 else 10 * enough.wait(30)

    assert agreement.together(replace(world, watchdog=Counts()), "slow", work) == [0, 10]  # type: ignore[arg-type]
    assert len(rounds) >= 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote."""
    folder = tmp_path_factory.mktemp("checkpoints")
    assert on_ranks(2, folder.parent / "meeting", write, folder) == [0, 0]
    return folder


@pytest.mark.parametrize("step", [10, 20])
def test_one_process_reads_what_two_ranks_wrote(folder: Path, step: int) -> None:
    """Step 20 was saved in the background, and everything overwritten before a byte was on disk."""
    checkpoint = open_checkpoint(folder / f"step-{step}")
    assert checkpoint.state["position"] == {"epoch": 1, "batch": 7}
    expected = whole_tensors()
    assert checkpoint.names == sorted(expected)
    for prefix in ("model", "optimizer", "random"):
        for name, value in checkpoint.tensors(prefix).items():
            torch.testing.assert_close(value, expected.pop(f"{prefix}.{name}"), rtol=0, atol=0)
    assert not expected
    assert_rows(list(checkpoint.keyed("model.users")), USERS)


def test_every_block_is_written_once(folder: Path) -> None:
    index = json.loads((folder / "step-10" / "model.safetensors.index.json").read_text())
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole_tensors().values())
    assert index["weight_map"]["model.items.weight"] == [first, second]
    assert index["weight_map"]["random.host"] == first
    assert isinstance(index["weight_map"]["model.twice"], str)


def test_rows_by_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder / "step-10")
    assert checkpoint.keyed_names == ["model.single", "model.streamed", "model.unused", "model.users"]
    assert_rows(list(checkpoint.keyed("model.streamed")), torch.arange(30))
    assert_rows(list(checkpoint.keyed("model.single")), torch.arange(2))
    assert_rows(list(checkpoint.keyed("model.unused")), torch.empty(0, dtype=torch.int64))
    assert (checkpoint.keyed_rows("model.streamed"), checkpoint.keyed_rows("model.unused")) == (30, 0)
    with pytest.raises(CheckpointError, match=r"holds no rows by key of model\.none"):
        checkpoint.keyed("model.none")


def read(world: World, folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "step-10", world)
    expected, room = held(world), held(world, empty=True)
    checkpoint.fill(room)
    for name, value in room.items():
        if isinstance(value, DTensor):
            assert torch.equal(value.full_tensor(), whole_tensors()[name])
        assert torch.equal(Shard.of(value).local, Shard.of(expected[name]).local), name
    mine = [piece.keys[piece.keys % world.size == world.rank] for piece in checkpoint.keyed("model.users")]
    assert torch.equal(torch.cat(world.all_gather(torch.cat(mine), "keys")).sort().values, USERS)
    message = refused(world, lambda: open_checkpoint(folder / "damaged", world) and None)
    assert "model-00002-of-00002.safetensors: its SHA-256 is not that of the manifest" in message


def test_four_ranks_read_what_two_ranks_wrote(folder: Path) -> None:
    damaged = folder / "damaged"
    damaged.mkdir()
    for file in (p for p in (folder / "step-10").rglob("*") if p.is_file()):
        copy = damaged / file.relative_to(folder / "step-10")
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    shard = damaged / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert on_ranks(4, folder.parent / "meeting-4", read, folder) == [0] * 4


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "keyed/00002-00001.safetensors"])
def test_a_damaged_file_of_a_rank_is_named(folder: Path, name: str) -> None:
    file = folder / "step-20" / name
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{file}: .* truncated or altered"):
            open_checkpoint(folder / "step-20")
    finally:
        file.write_bytes(content)
    open_checkpoint(folder / "step-20")


def test_blocks_and_what_cannot_be_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "step-10")
    table = whole_tensors()["model.items.weight"]
    assert checkpoint.shape_of("model.items.weight") == (11, 3)
    for first, last in ((0, 11), (4, 9), (5, 6), (6, 11), (3, 3)):
        assert torch.equal(checkpoint.read("model.items.weight", (first, 1), (last - first, 2)), table[first:last, 1:])
    with pytest.raises(CheckpointError, match=r"a block \[2, 3\] at \[10, 0\] does not lie in \[11, 3\]"):
        checkpoint.read("model.items.weight", (10, 0), (2, 3))
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.none"):
        checkpoint.shape_of("model.none")
    with pytest.raises(CheckpointError, match=r"model\.bias is \[6\], \[7\] is wanted"):
        checkpoint.fill({"model.bias": torch.empty(7)})


def test_a_delta_brings_weights_up_to_date(folder: Path) -> None:
    weights = open_checkpoint(folder / "step-10").tensors("model")
    expected = {name: value.clone() for name, value in weights.items()}
    for row in (2, 5, 10):
        expected["items.weight"][row] = row
    expected["bias"].zero_()
    delta = open_delta(folder / "delta-15")
    assert (delta.mark_step, delta.step) == (10, 15)
    assert apply_delta(weights, 10, delta) == ["model.users"]
    for name, value in weights.items():
        assert torch.equal(value, expected[name])
    assert_rows(list(delta.keyed("model.users")), torch.tensor([2, 5, 10]))
    with pytest.raises(CheckpointError, match="leads from step 10 to 15, the weights are of step 9"):
        apply_delta(weights, 9, delta)
    with pytest.raises(CheckpointError, match="row 10 is beyond the 9 rows"):
        apply_delta({**weights, "items.weight": weights["items.weight"][:9]}, 12, delta)
    with pytest.raises(CheckpointError, match=r"does not fit the model: bias"):
        apply_delta({**weights, "bias": torch.zeros(5)}, 12, delta)
    with pytest.raises(CheckpointError, match="a delta of rows, not a checkpoint"):
        open_checkpoint(folder / "delta-15")
    with pytest.raises(CheckpointError, match="a checkpoint, not a delta"):
        open_delta(folder / "step-10")


def save_and_die(world: World, folder: Path, victim: int, where: str) -> None:
    real = getattr(disk, where)

    def dies(*arguments: Any) -> Any:
        if world.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    save_snapshot(folder / "step-10", Snapshot({"model.x": torch.ones(3)}, {}, documents(10)), world)
    setattr(disk, where, dies)
    save_snapshot(folder / "step-20", Snapshot({"model.x": torch.zeros(3)}, {}, documents(20)), world)


@pytest.mark.parametrize(
    ("victim", "where"), [(0, "record"), (1, "record"), (0, "write_manifest"), (0, "put_in_place")]
)
def test_a_rank_killed_in_a_save_leaves_the_earlier_checkpoint(tmp_path: Path, victim: int, where: str) -> None:
    folder = tmp_path / "checkpoints"
    codes = on_ranks(2, tmp_path / "meeting", save_and_die, folder, victim, where)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1  # its collective fails
    assert list_steps(folder) == [10]
    assert open_checkpoint(folder / "step-10").tensors("model")["x"].tolist() == [1.0] * 3
    assert bool(list(folder.glob(".*"))) == (victim == 0)  # the first rank removes it, if it lives
    remove_partial(folder)
    assert [path.name for path in folder.iterdir()] == ["step-10"]


def end_without_waiting(world: World, folder: Path) -> None:
    """The process groups are gone before anything is written."""
    gate, write_blocks = threading.Event(), tensor_files.write_blocks

    def slow(*arguments: Any) -> str:
        assert gate.wait(30)
        return write_blocks(*arguments)

    tensor_files.write_blocks = slow
    snapshot = Snapshot({"model.x": torch.ones(3)}, {}, documents(10))
    AsyncSaver(world).save(folder / "step-10", snapshot)
    threading.Timer(0.5, gate.set).start()


def test_ranks_that_end_without_waiting_do_not_hang(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert on_ranks(2, tmp_path / "meeting", end_without_waiting, folder, seconds=30) == [0, 0]
    remove_partial(folder)
    for path in folder.iterdir():  # with these groups or without them: whole, or not at all
        assert open_checkpoint(path).tensors("model")["x"].tolist() == [1.0] * 3
