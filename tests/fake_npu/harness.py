"""Running programs on the fake npu: each in a process of its own, for the device's name can be given once.

from fake_npu.harness import needs_fake_npu, on_npu, npu_rec_on_npu

pytestmark = needs_fake_npu
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_npu.fake_npu_build import compiler, library, metadata

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
PROGRAMS = FOLDER / "programs"

needs_fake_npu = pytest.mark.skipif(
    compiler() is None or importlib.util.find_spec("torch_npu") is not None,
    reason="the fake npu needs a C++ compiler, and no real torch_npu beside it",
)

# These belong to the process of the tests: the child is like a fresh shell.
_DROPPED = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "TRITON_INTERPRET", "LOCAL_RANK", "RANK", "WORLD_SIZE")


def environment(*, strict: bool = False, **more: str) -> dict[str, str]:
    """The variables of a process that finds the stand-in as torch_npu; builds it when needed."""
    library()
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    path = os.pathsep.join(map(str, (FOLDER, metadata(), REPOSITORY)))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAKE_NPU_STRICT": str(int(strict)), **more}


def on_npu(program: str, *arguments: object, strict: bool = False, **more: str) -> str:
    """Run `programs/<program>`; what it prints. Its failing fails the test."""
    done = subprocess.run(
        [sys.executable, PROGRAMS / program, *map(str, arguments)],
        env=environment(strict=strict, **more),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes_on_npu(program: str, count: int, folder: Path, *, strict: bool = False) -> None:
    """Run `programs/<program>` in `count` processes, a device each, that meet by a file in `folder`."""
    world = {"WORLD_SIZE": str(count), "FAKE_NPU_DEVICES": str(count), "MEETING_POINT": str(folder / "store")}
    base = environment(strict=strict, **world)
    running = [
        subprocess.Popen(
            [sys.executable, PROGRAMS / program],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [error for process, error in zip(running, errors, strict=True) if process.returncode]
    assert not failed, "\n\n".join(failed)


def npu_rec_on_npu(*arguments: object, strict: bool = False, **more: str) -> Any:
    """Run `npu-rec ... --json`; the document it prints."""
    with start_npu_rec(*arguments, "--json", strict=strict, **more) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(out)


def start_npu_rec(*arguments: object, strict: bool = False, **more: str) -> subprocess.Popen[str]:
    """Start `npu-rec ...`."""
    return subprocess.Popen(
        [sys.executable, "-m", "npu_rec", *map(str, arguments)],
        env=environment(strict=strict, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def commands_on_npu(commands: Mapping[str, Sequence[object]], *, strict: bool = False) -> dict[str, Any]:
    """Run several `npu-rec ... --json` one after the other in one process; the document that each prints."""
    given = json.dumps({name: [*map(str, arguments), "--json"] for name, arguments in commands.items()})
    documents: dict[str, Any] = json.loads(on_npu("commands.py", given, strict=strict))
    return documents
