"""Commands in processes forked from one that has imported PyTorch already, which takes seconds every time.

As a program, that process: it reads a request a line and answers with the exit code of the command.
"""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`npu-rec ARGUMENTS`; of the variables those count that are not read as PyTorch is imported."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("out", "err")}
        request = {"arguments": arguments, "cwd": str(cwd), "environment": dict(environment)}
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps(request | {n: str(path) for n, path in files.items()}), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
        except BaseException:  # a test that took too long, for one: its command ends with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _process.cache_clear()
            raise
        out, err = (path.read_text(encoding="utf-8") for path in files.values())
        return subprocess.CompletedProcess(arguments, code, out, err)


@functools.cache
def _process() -> subprocess.Popen[str]:
    """The program below; its input ends with this process, and it with that."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        env={**kept, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _command(request: Mapping[str, Any]) -> None:
    """What the forked process does."""
    from npu_rec.cli import main

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["npu-rec", *request["arguments"]]
    main()


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  the first optimiser would

    import npu_rec.train  # noqa: F401  what most commands need

    gc.freeze()  # a collection would copy all pages of the fork
    while line := sys.stdin.readline():
        command = multiprocessing.get_context("fork").Process(target=_command, args=(json.loads(line),))
        command.start()
        command.join()
        print(command.exitcode, flush=True)
