"""Obtain, verify, convert once: `prepare` returns the folder of a prepared data set, making it where needed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_rec.config import DataConfig, validate
from npu_rec.data.convert import convert
from npu_rec.data.download import Log
from npu_rec.data.manifest import FORMAT, seal, verify
from npu_rec.data.recipe import Recipe
from npu_rec.data.rows import Rows
from npu_rec.data.sources import existing, is_archive, unpack
from npu_rec.errors import ConfigError, DataError
from npu_rec.registry import lookup


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare(config: DataConfig, *, refresh: bool = False, log: Log = _to_stderr) -> Path:
    """The prepared data set of a configuration; made if it is missing, damaged or out of date.

    It is out of date when the recipe's name or options, `on_bad_row`, `duplicates`, the format, or the source (path,
    size or time of change of its files) differ; a change of a recipe's code is not noticed. Several processes may
    prepare the same data at once: each writes a folder of its own and the first to rename it wins.

    Args:
        config: the section `data`.
        refresh: make it anew.
        log: takes progress lines and what was dropped.

    Returns:
        `<dir>/<name>-<fingerprint>`, see `npu_rec.data.store.SequenceStore`.

    Raises:
        ConfigError: for an unknown recipe or wrong options.
        DataError: when the files cannot be had or used.
    """
    entry = lookup("data", config.name)
    options = validate(entry.options, config.options, {}, ("data", "options"))
    recipe: Recipe = entry.target(options)
    if recipe.generated and config.source is not None:
        raise ConfigError(f"data.source: {config.name} is made up, it reads no source")
    try:
        source = None if config.source is None else existing(config.source.expanduser())
        settings = {
            "format": FORMAT,
            "recipe": config.name,
            "options": options.model_dump(mode="json"),
            "on_bad_row": config.on_bad_row,
            "duplicates": config.duplicates,
            "source": _describe_source(recipe, source),
        }
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        target = data_dir(config) / f"{config.name}-{fingerprint}"
        if target.exists() and not refresh:
            try:
                verify(target)
                return target
            except DataError as error:
                log(f"{error}; making it anew")
        return _make(config, recipe, source, {**settings, "fingerprint": fingerprint}, target, log)
    except OSError as error:
        hint = "; data.dir names another place" if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS) else ""
        where = f"{error.filename}: " if error.filename else ""
        raise DataError(f"{config.name}: cannot be prepared: {where}{error.strerror or error}{hint}") from error


def data_dir(config: DataConfig) -> Path:
    """Where prepared data sets are kept."""
    if config.dir is not None:
        return config.dir.expanduser()
    home = os.environ.get("NPU_REC_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "npu-rec") / "data"


def _describe_source(recipe: Recipe, source: Path | None) -> Any:
    """What decides whether prepared data is still that of the source."""
    if source is None:
        return recipe.identity()
    files = [path.resolve() for path in recipe.inputs(source)]
    stats = [(path, path.stat()) for path in files]
    return [{"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for path, stat in stats]


def _make(
    config: DataConfig, recipe: Recipe, source: Path | None, settings: dict[str, Any], target: Path, log: Log
) -> Path:
    base = target.parent
    outdated = target.stat().st_ino if target.exists() else None
    with _scratch(base) as work, _scratch(base) as result:
        if source is None and not recipe.generated:
            log(f"{config.name}: {recipe.terms}")
            source = recipe.obtain(base / "downloads", log)
        unpacked = work / "source"
        unpacked.mkdir()
        if source is not None:
            log(f"{config.name}: reading {source}")
        if source is not None and is_archive(source):
            unpack(source, recipe.wanted(), unpacked)
        rows = Rows(config.on_bad_row, log, work)
        data = recipe.read(source if source is not None and not is_archive(source) else unpacked, rows)
        written = convert(recipe, data, rows, config.duplicates == "drop", result)
        about = {"description": recipe.description, "terms": recipe.terms}
        about["actions"] = recipe.actions if written["has_actions"] else ""
        seal(result, {**settings, **about, **written})
        rows.report()
        for line in (*_remarks(recipe, written["counts"]), *(f"{what}: {n}" for what, n in data.counts.items())):
            log(f"{config.name}: {line}")
        _publish(result, target, outdated)
    log(f"{config.name}: prepared in {target}")
    return target


def _remarks(recipe: Recipe, counts: dict[str, int]) -> Iterator[str]:
    yield "{users} users, {items} items ({items_seen} with events), {events} events".format(**counts)
    read, published = counts["events_before_filter"], recipe.published_events
    if counts["events"] != read:
        yield f"the recipe's filter took {read - counts['events']} of {read} events out"
    if published is not None and read + counts["duplicates_dropped"] + counts["bad_rows_dropped"] != published:
        yield f"note: the publisher's file has {published} events, this one {read}"
    if counts["duplicates"]:
        what = "dropped" if counts["duplicates_dropped"] else "kept (data.duplicates: drop takes them out)"
        yield f"{counts['duplicates']} events equal an earlier one in every column; {what}"
    if counts["times_out_of_order"]:
        yield f"note: {counts['times_out_of_order']} events are earlier than the one before; the file's order stays"


@contextlib.contextmanager
def _scratch(base: Path) -> Iterator[Path]:
    """A new folder beside the result, removed at the end if it is still there."""
    folder = base / f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(result: Path, target: Path, outdated: int | None) -> None:
    """Rename the result to its place.

    Args:
        outdated: inode of the folder to replace; one that another process put there meanwhile stays.
    """
    old = target.parent / f"{result.name}-old"
    if outdated is not None:
        with contextlib.suppress(FileNotFoundError):
            if target.stat().st_ino == outdated:
                os.rename(target, old)
    try:
        os.rename(result, target)
    except OSError:
        if not target.exists():
            raise
        verify(target)  # another process was faster; its data is the same
    shutil.rmtree(old, ignore_errors=True)
