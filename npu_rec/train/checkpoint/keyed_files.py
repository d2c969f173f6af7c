"""Rows by key in safetensors files: every rank writes its own, any number of rows, in pieces that fit into memory.

torch.distributed.checkpoint addresses blocks by their place in a tensor of known shape; rows by key have neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint.contents import KEYS, Keyed

FOLDER = "keyed"
INDEX = f"{FOLDER}/index.json"
PIECE_BYTES = 256 << 20  # what a reader holds at once


@dataclass(frozen=True)
class KeyedFile:
    """A file with rows of `name`."""

    name: str
    file: str
    rows: int


class KeyedWriter:
    """Writes this rank's rows into `folder`, which must have the subfolder `keyed`."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.files: list[KeyedFile] = []

    def write(self, name: str, rows: Keyed) -> None:
        """Write rows, in as many files as it takes."""
        width = sum(c.element_size() * c[0].numel() for c in (rows.keys, *rows.columns.values()) if len(c))
        at_once = max(1, PIECE_BYTES // max(1, width))
        for start in range(0, len(rows.keys), at_once):
            piece = slice(start, start + at_once)
            tensors = {KEYS: rows.keys[piece], **{column: values[piece] for column, values in rows.columns.items()}}
            file = f"{FOLDER}/{self.rank + 1:05d}-{len(self.files) + 1:05d}.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, self.folder / file)
            self.files.append(KeyedFile(name, file, len(tensors[KEYS])))


def write_index(folder: Path, names: Iterable[str], files: Iterable[KeyedFile]) -> str:
    """Which rows lie in which files, of all ranks."""
    places: dict[str, list[dict[str, str | int]]] = {name: [] for name in names}
    for one in files:
        places[one.name].append({"file": one.file, "rows": one.rows})
    (folder / INDEX).write_text(json.dumps(places, indent=1))
    return INDEX


def read_index(folder: Path) -> dict[str, list[KeyedFile]]:
    """The files of every name; none when nothing by key was saved."""
    if not (folder / INDEX).is_file():
        return {}
    places: Mapping[str, list[dict[str, str]]] = json.loads((folder / INDEX).read_text())
    return {name: [KeyedFile(name, e["file"], int(e["rows"])) for e in found] for name, found in places.items()}


def read_pieces(folder: Path, files: Iterable[KeyedFile]) -> Iterator[Keyed]:
    """The rows of files, a file at a time."""
    for one in files:
        try:
            tensors = load_file(folder / one.file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / one.file}: cannot be read: {error}") from None
        yield Keyed(tensors.pop(KEYS), tensors)
