"""Folders of checkpoints on disk: written beside their place and renamed, each with a manifest of hashes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from npu_rec.data.download import file_digest
from npu_rec.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"

FileRecords = dict[str, tuple[str, int]]
"""Path inside the folder -> (SHA-256, bytes)."""


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before it is at its place: the same on all ranks."""
    return path.parent / f".{path.name}.partial-save"


def _replaced(path: Path) -> Path:
    return path.parent / f".{path.name}.partial-replaced"


def put_in_place(path: Path) -> None:
    """Rename what was written for `path` to it."""
    if path.exists():
        path.rename(_replaced(path))
    partial_of(path).rename(path)
    sync(path.parent)
    shutil.rmtree(_replaced(path), ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what a killed save left behind; what it was about to replace goes back to its place."""
    for partial in folder.glob(".*.partial-*") if folder.is_dir() else ():
        path = folder / partial.name[1:].rpartition(".partial-")[0]
        if partial == _replaced(path) and not path.exists():
            partial.rename(path)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    names = (p.name for p in folder.iterdir() if p.is_dir())
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())


def prune(folder: Path, keep: int, *best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps `best`."""
    for step in list_steps(folder)[:-keep]:
        if step not in best:
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)


def drop_later(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`: a run taken up there leaves them behind."""
    for later in list_steps(folder):
        if later > step:
            shutil.rmtree(folder / f"step-{later}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses is a CheckpointError of the checkpoint `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}; earlier checkpoints are untouched") from error


def record(folder: Path, names: Iterable[str]) -> FileRecords:
    """Flush files to disk and hash them."""
    for name in names:
        sync(folder / name)
    return {name: (file_digest(folder / name, "sha256"), (folder / name).stat().st_size) for name in names}


def write_manifest(folder: Path, files: Mapping[str, tuple[str, int]]) -> None:
    """The last file of a folder: what belongs to it."""
    entries = {name: {"sha256": digest, "bytes": size} for name, (digest, size) in sorted(files.items())}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))
    sync(folder / MANIFEST)
    for inside in {(folder / name).parent for name in files} | {folder}:
        sync(inside)


def read_manifest(folder: Path) -> FileRecords:
    """What belongs to a folder.

    Raises:
        CheckpointError: no manifest, a damaged one, or one of another format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    if not path.is_file():
        steps = list_steps(folder / "checkpoints")
        hint = f"; did you mean {folder / 'checkpoints' / f'step-{steps[-1]}'}?" if steps else ""
        raise CheckpointError(f"{folder}: not a checkpoint (no {MANIFEST}){hint}")
    try:
        manifest = json.loads(path.read_text())
        files = {str(name): (str(e["sha256"]), int(e["bytes"])) for name, e in manifest["files"].items()}
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise CheckpointError(f"{path}: damaged; use another checkpoint") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder}: format {version}, this version reads {FORMAT}")
    return files


def check_file(file: Path, digest: str, size: int) -> None:
    """Raise CheckpointError unless a file is what the manifest says."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; use another checkpoint")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes instead of {size}: truncated or altered")
    try:
        found = file_digest(file, "sha256")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; use another checkpoint") from None
    if found != digest:
        raise CheckpointError(f"{file}: its SHA-256 is not that of the manifest: damaged or altered")


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
