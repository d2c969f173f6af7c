"""`manifest.json`: what a prepared folder holds, with size and SHA-256 of every file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npu_rec.data.download import file_digest
from npu_rec.errors import DataError

FORMAT = 1
_FILE = "manifest.json"


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a finished folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path, "sha256")}
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({**manifest, "files": files}, indent=2, ensure_ascii=False)
    (folder / _FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after a check of the files' sizes.

    Raises:
        DataError: when the folder is no prepared data set, is of another format, or a file is missing or cut.
    """
    path = folder / _FILE
    again = "prepare the data again (npu-rec data prepare)"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except OSError as error:
        raise DataError(f"{folder}: not a prepared data set: {error.strerror}: {_FILE}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); {again}") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}; {again}")
    for name, known in files:
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != known["bytes"]:
            raise DataError(f"{file}: {'missing' if size is None else f'{size} bytes'}, not {known['bytes']}; {again}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """As `read_manifest`, but every byte is checked against the SHA-256."""
    manifest = read_manifest(folder)
    for name, known in manifest["files"].items():
        if file_digest(folder / name, "sha256") != known["sha256"]:
            raise DataError(f"{folder / name}: damaged, its SHA-256 differs; prepare the data again")
    return manifest
