"""Writing a checkpoint from all ranks, so that it is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from npu_rec.distributed.world import ALONE, World
from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint import disk, keyed_files, tensor_files
from npu_rec.train.checkpoint.agreement import together
from npu_rec.train.checkpoint.contents import Keyed, Shard, Snapshot
from npu_rec.train.checkpoint.keyed_files import KeyedFile, KeyedWriter
from npu_rec.train.checkpoint.plan import Block, describe, plan_files


def save_snapshot(path: Path, snapshot: Snapshot, world: World = ALONE) -> None:
    """Write a checkpoint at `path`, which all ranks reach. All ranks call it; it is in place when it returns.

    Raises:
        CheckpointError: it cannot be written, on some rank: the same line on all ranks. Earlier checkpoints stay.
    """
    finish(prepare(path, snapshot, world, copy=False), world)


@dataclass(frozen=True)
class Prepared:
    """What this rank has yet to write, in host memory."""

    path: Path
    snapshot: Snapshot
    tensors: dict[str, Shard]
    files: list[tuple[int, list[Block]]]
    """Number of each tensor file of this rank, and the blocks in it."""
    total_files: int
    keyed: dict[str, Keyed]
    writer: KeyedWriter


@dataclass(frozen=True)
class _Written:
    records: disk.FileRecords
    tensor_files: dict[str, list[Block]]
    keyed_files: list[KeyedFile]


def prepare(path: Path, snapshot: Snapshot, world: World, *, copy: bool) -> Prepared:
    """Make the folder, agree who writes what, bring it to host memory and write what is too large for that.

    Args:
        copy: whether host memory is copied too, so that training may change it afterwards.
    """
    partial = disk.partial_of(path)

    def begin() -> tuple[list[Block], list[str]]:
        if world.is_first:
            with disk.writing(path):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                if snapshot.keyed:
                    (partial / keyed_files.FOLDER).mkdir()
        return describe(snapshot.tensors), sorted(snapshot.keyed)

    def gather() -> Prepared:
        mine = [(1 + sum(map(len, files[: world.rank])) + i, blocks) for i, blocks in enumerate(files[world.rank])]
        names = {block.name for _, blocks in mine for block in blocks}
        tensors = {name: _on_host(snapshot.tensors[name], copy) for name in snapshot.tensors if name in names}
        writer, keyed = KeyedWriter(partial, world.rank), {}
        with disk.writing(path):
            for name, rows in snapshot.keyed.items():
                if isinstance(rows, Keyed):
                    keyed[name] = rows.copy() if copy else rows
                else:
                    for piece in rows:
                        writer.write(name, piece)
        return Prepared(path, snapshot, tensors, mine, sum(map(len, files)), keyed, writer)

    with _removed_on_failure(path, world):
        said = together(world, f"checkpoint {path.name}: who writes what", begin)
        for rank, (_, names) in enumerate(said):
            if names != sorted(snapshot.keyed):
                raise CheckpointError(f"{path}: rows by key of rank {rank} are {names}, here {sorted(snapshot.keyed)}")
        files = plan_files([blocks for blocks, _ in said])
        return together_here(world, f"checkpoint {path.name}: copied", gather)


def together_here(world: World, what: str, work: Callable[[], Prepared]) -> Prepared:
    """As `together`, but what this rank made stays here."""
    made: list[Prepared] = []
    together(world, what, lambda: made.append(work()))
    return made[0]


def finish(prepared: Prepared, world: World) -> None:
    """Write what was prepared and put the checkpoint in its place."""
    path, partial = prepared.path, disk.partial_of(prepared.path)

    def write() -> _Written:
        with disk.writing(path):
            tensors = {
                tensor_files.write_blocks(partial, blocks, prepared.tensors, number, prepared.total_files): blocks
                for number, blocks in prepared.files
            }
            for name, rows in prepared.keyed.items():
                prepared.writer.write(name, rows)
            names = [*tensors, *(one.file for one in prepared.writer.files)]
            return _Written(disk.record(partial, names), tensors, prepared.writer.files)

    def complete() -> None:
        if world.is_first:
            with disk.writing(path):
                names = _write_rest(partial, prepared.snapshot, written)
                files = {name: entry for one in written for name, entry in one.records.items()}
                disk.write_manifest(partial, files | disk.record(partial, names))
                disk.put_in_place(path)

    with _removed_on_failure(path, world):
        written = together(world, f"checkpoint {path.name}: written", write)
        together(world, f"checkpoint {path.name}: put in place", complete)


def _write_rest(folder: Path, snapshot: Snapshot, written: list[_Written]) -> list[str]:
    """What the first rank writes alone; the names of its files."""
    names = [tensor_files.write_index(folder, {k: v for one in written for k, v in one.tensor_files.items()})]
    if snapshot.keyed:
        files = [file for one in written for file in one.keyed_files]
        names.append(keyed_files.write_index(folder, snapshot.keyed, files))
    for name, text in snapshot.documents.items():
        (folder / name).write_text(text)
    for name, source in snapshot.copies.items():
        shutil.copyfile(source, folder / name)
    return [*names, *snapshot.documents, *snapshot.copies]


def _on_host(value: Tensor | Shard | DTensor, copy: bool) -> Shard:
    shard = Shard.of(value)
    return Shard(shard.local.detach().to("cpu", copy=copy), shard.offsets, shard.shape)


@contextmanager
def _removed_on_failure(path: Path, world: World) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if world.is_first:
            shutil.rmtree(disk.partial_of(path), ignore_errors=True)
        raise
