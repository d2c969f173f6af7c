"""What Ascend's compiler made of a text, kept beside the compilers: most runs lower the same kernels as the one before.

Installing the compilers anew removes it. Errors are not kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from npu_rec.kernels.ascend import tools


def find(key: tuple[str, ...]) -> dict[str, Any] | None:
    """What was kept for a compiler, its arguments and its input; None where nothing was."""
    try:
        found: dict[str, Any] = json.loads(gzip.decompress(_path(key).read_bytes()))
    except (OSError, EOFError, ValueError):  # absent, or damaged
        return None
    return found


def keep(key: tuple[str, ...], value: dict[str, Any]) -> None:
    """Keep it, if the folder can be written."""
    with suppress(OSError):
        path = _path(key)
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")  # renamed when whole
        beside.write_bytes(gzip.compress(json.dumps(value).encode(), 5))
        beside.replace(path)


def _path(key: tuple[str, ...]) -> Path:
    compiler = Path(key[0]).stat()
    named = json.dumps([tools.PACKAGES, compiler.st_size, compiler.st_mtime_ns, *key])
    return tools.folder() / "lowered" / f"{hashlib.sha256(named.encode()).hexdigest()}.gz"
