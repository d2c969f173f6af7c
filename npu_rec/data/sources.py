"""Finds the files of a data set in a folder, beside a file, or inside a .zip archive."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

from npu_rec.errors import DataError


def find(source: Path, *names: str, folder: str = "") -> Path | None:
    """The first of the named files, plain or .gz, in the source or in its sub-folder.

    Args:
        source: a folder, or a file of the data set, whose neighbours count then.
        names: file names in order of preference.
        folder: name of the folder inside the publisher's archive.
    """
    base = source if source.is_dir() else source.parent
    for name in names:
        for place in (base, base / folder):
            for candidate in (place / name, place / f"{name}.gz"):
                if candidate.is_file():
                    return candidate
    return None


def need(source: Path, *names: str, folder: str = "", why: str) -> Path:
    """As `find`, but a missing file is a DataError that says what the file is for."""
    path = find(source, *names, folder=folder)
    if path is None:
        base = source if source.is_dir() else source.parent
        raise DataError(f"{base}: no {' or '.join(names)} there ({why}); data.source names its folder")
    return path


def matching(source: Path, pattern: str, folder: str = "") -> list[Path]:
    """Files by a pattern of their names, plain or else .gz, by name; searched as `find`, the first place with any."""
    base = source if source.is_dir() else source.parent
    for place in (base, base / folder):
        plain, packed = ([p for p in place.glob(name) if p.is_file()] for name in (pattern, f"{pattern}.gz"))
        found = {path.name.removesuffix(".gz"): path for path in (*packed, *plain)}
        if found:
            return [found[name] for name in sorted(found)]
    return []


def existing(source: Path) -> Path:
    """The source itself, if there is one that can be read."""
    if not source.exists():
        raise DataError(f"data.source: {source}: no such file or folder")
    if source.name.endswith((".tar", ".tar.gz", ".tgz", ".7z", ".rar")):
        raise DataError(f"data.source: {source}: of archives .zip alone is read; unpack it and name its folder")
    return source


def is_archive(source: Path) -> bool:
    """Whether the source has to be unpacked first."""
    return source.is_file() and source.suffix in (".zip", ".whl")


def unpack(archive: Path, wanted: Collection[str], into: Path) -> Path:
    """Unpack an archive's files into one folder, without the archive's own folders.

    Args:
        wanted: names of the files to take, plain or .gz; empty: all.

    Raises:
        DataError: when the archive is truncated or damaged, or holds two wanted files of one name.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                name = Path(member.filename).name
                if member.is_dir() or (wanted and name.removesuffix(".gz") not in wanted):
                    continue
                if (into / name).exists():
                    raise DataError(f"{archive.name}: holds several files named {name}; unpack it and set data.source")
                member.filename = name
                packed.extract(member, into)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name}: the archive is truncated or damaged ({error}); get it again") from None
    return into
