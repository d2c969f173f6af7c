"""Lowers the kernels for Ascend with Ascend's own compiler, for any chip, with no NPU present.

triton-ascend turns the launches of the catalogue into linalg (frontend.py, a process of its own), `bishengir-compile`
turns that into the final program with its on-chip memory plan. Its last step, the closed assembler `hivmc` of CANN,
is not public: a stand-in that does nothing takes its place. Everything before it is real: types, tiling, the plan of
the buffers, synchronisation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import npu_rec
from npu_rec.device.profile import ASCEND_CHIPS
from npu_rec.errors import DeviceError
from npu_rec.kernels.ascend import kept, tools
from npu_rec.kernels.ascend.hivm import Program, read_program

CHIPS = ("Ascend910B1", "Ascend910B4", "Ascend910_9391", "Ascend950PR_9589")
_ATTEMPTS = 3  # the compiler crashes now and then on input that it compiles the next time


@dataclass(frozen=True)
class Row:
    """A kernel on a chip.

    Attributes:
        kernel: `operator.kernel`; `case`: of which call.
        status: `lowered` or `failed`, and then `reason` says why.
        tile: rows and columns of a score tile, or rows and width of what a program works on at once.
        cores: `cube + vector` or `vector`.
        ub, l1, l0c: bytes at the peak, and of the chip (None where not known).
        multi_buffered: whether loads overlap with the work on the tile before; the compiler gives it up for space.
        scalar_loads_in_loops: places where single elements are loaded or stored through computed addresses.
        vector_ops, cube_ops: library calls in the loops over tiles; of vector calls those on a full tile.
        time_bias_vector_ops: of `vector_ops` what the time bias costs; None without one, or where the compiler cannot
            lower the kernel without it.
    """

    kernel: str
    case: str
    chip: str
    status: str
    reason: str | None
    tile: str
    cores: str = ""
    ub_peak_bytes: int | None = None
    ub_capacity_bytes: int | None = None
    l1_peak_bytes: int | None = None
    l1_capacity_bytes: int | None = None
    l0c_peak_bytes: int | None = None
    l0c_capacity_bytes: int | None = None
    multi_buffered: bool | None = None
    scalar_loads_in_loops: int | None = None
    vector_ops: int | None = None
    cube_ops: int | None = None
    time_bias_vector_ops: int | None = None


@dataclass(frozen=True)
class _Lowered:
    program: Program
    multi_buffered: bool


def lower(chips: tuple[str, ...] = CHIPS, kernels: str = "", *, install: bool = False) -> list[Row]:
    """Lower every kernel whose name begins with `kernels` for each chip; `install` the compilers first if absent.

    Raises:
        DeviceError: the compilers are not installed, or no chip or kernel is named so.
    """
    for chip in chips:
        if chip not in ASCEND_CHIPS:
            known = ", ".join(name.removeprefix("Ascend") for name in ASCEND_CHIPS)
            raise DeviceError(f"unknown chip {chip.removeprefix('Ascend')!r}: choose one of {known}")
    if install:
        tools.install()
    reason = tools.unavailable()
    if reason is not None:
        raise DeviceError(reason)
    with tempfile.TemporaryDirectory(prefix="npu-rec-lower-") as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        _write_stand_ins(folder)
        by_chip = pool.map(lambda chip: _front_end(folder, chip, kernels), chips)
        launches = [(chip, launch) for chip, found in zip(chips, by_chip, strict=True) for launch in found]
        if not launches:
            raise DeviceError(f"no kernel's name, operator.kernel, begins with {kernels!r}")
        compiler = _Compiler(folder)
        return list(pool.map(lambda item: _row(compiler, *item), launches))


def _write_stand_ins(folder: Path) -> None:
    """`hivmc`, which the compiler calls last: answers with a version and writes nothing."""
    for name in ("hivmc", "hivmc-a5"):
        path = folder / name
        path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "hivmc version 1.2.0"\nexit 0\n')
        path.chmod(0o755)


def _front_end(folder: Path, chip: str, kernels: str) -> list[dict[str, Any]]:
    """The launches of the catalogue (`frontend.Launch`) as dictionaries."""
    texts = folder / chip
    texts.mkdir()
    package = Path(npu_rec.__file__).parent.parent
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join([str(tools.folder()), str(package)]),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "npu_rec.kernels.ascend.frontend", str(texts), chip, kernels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1]
        raise DeviceError(
            f"triton-ascend does not start ({error}); remove {tools.folder()}, then `npu-rec lower --install`"
        )
    launches: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return launches


def _row(compiler: _Compiler, chip: str, launch: dict[str, Any]) -> Row:
    constants, profile = launch["constants"], ASCEND_CHIPS[chip]
    rows, columns = (next(constants[x] for x in names if x in constants) for names in (("BM", "ROWS"), ("BN", "BLOCK")))
    labels = {"kernel": f"{launch['operator']}.{launch['kernel']}", "case": launch["case"], "chip": chip}
    tile = f"{rows}x{columns}"
    lowered = launch["reason"] or compiler.lower(chip, launch["text"], launch["flags"])
    without = compiler.lower(chip, launch["without_time"], launch["flags"]) if launch["without_time"] else None
    if isinstance(lowered, str):
        return Row(**labels, status="failed", reason=lowered, tile=tile)
    vector_ops = lowered.program.full_tile_operations(rows * columns)
    time_bias = None
    if isinstance(without, _Lowered):
        time_bias = vector_ops - without.program.full_tile_operations(rows * columns)
    capacities = {"ub": profile.ub_bytes, "l1": profile.l1_bytes, "l0c": profile.l0c_bytes}
    too_much = [
        f"{name} holds {capacity} bytes, {lowered.program.peaks[name]} are used"
        for name, capacity in capacities.items()
        if capacity is not None and lowered.program.peaks.get(name, 0) > capacity
    ]
    return Row(
        **labels,
        status="failed" if too_much else "lowered",
        reason="; ".join(too_much) or None,
        tile=tile,
        cores=" + ".join(lowered.program.cores),
        ub_peak_bytes=lowered.program.peaks.get("ub"),
        ub_capacity_bytes=profile.ub_bytes,
        l1_peak_bytes=lowered.program.peaks.get("l1"),
        l1_capacity_bytes=profile.l1_bytes,
        l0c_peak_bytes=lowered.program.peaks.get("l0c"),
        l0c_capacity_bytes=profile.l0c_bytes,
        multi_buffered=lowered.multi_buffered,
        scalar_loads_in_loops=lowered.program.scalar_loads_in_loops,
        vector_ops=vector_ops,
        cube_ops=len(lowered.program.in_tile_loops("cube")),
        time_bias_vector_ops=time_bias,
    )


class _Compiler:
    """`bishengir-compile`; the same text is compiled once, and in later runs not at all (kept.py)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[tuple[str, ...], Future[_Lowered | str]] = {}
        self._lock = Lock()

    def lower(self, chip: str, text: str, flags: list[str]) -> _Lowered | str:
        """The kernel in the file `text` for a chip, or the compiler's reason why not."""
        command = _command(chip, flags)
        key = (*command, Path(text).read_text(encoding="utf-8"))
        with self._lock:
            known = self._done.get(key)
            future = self._done.setdefault(key, Future())
        if known is None:
            try:
                future.set_result(self._kept(key) or self._compiled(key, command, Path(text)))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    @staticmethod
    def _kept(key: tuple[str, ...]) -> _Lowered | None:
        found = kept.find(key)
        return None if found is None else _Lowered(read_program(found["program"]), found["multi_buffered"])

    def _compiled(self, key: tuple[str, ...], command: list[str], text: Path) -> _Lowered | str:
        found = _compile(self._folder, command, text)
        if isinstance(found, str):
            return found
        kept.keep(key, found)
        return _Lowered(read_program(found["program"]), found["multi_buffered"])


def _command(chip: str, flags: list[str]) -> list[str]:
    """The compiler for a chip and its arguments, but for files."""
    a5 = "950" in chip
    return [
        str(tools.compiler("-a5" if a5 else "")), f"--target={chip}", *flags,
        "--enable-hfusion-compile=true", "--enable-triton-kernel-compile=true",
        *([] if a5 else ["--enable-hivm-compile=true"]),
    ]  # fmt: skip


def _compile(folder: Path, command: list[str], text: Path) -> dict[str, Any] | str:
    """The text of the `program` and whether it is `multi_buffered`, or the first error of the compiler."""
    work = text.with_suffix("")
    work.mkdir()
    command = [*command, str(text), f"--save-temps={work}", "-o", str(work / "kernel.o")]
    environment = {**os.environ, "PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")])}
    program = work / "module.hivm.opt.mlir"
    for _ in range(_ATTEMPTS):
        try:
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"bishengir-compile does not start ({error}); remove {tools.folder()} and install it again"
        if done.returncode >= 0:  # not killed by a signal
            break
    messages = (done.stdout + done.stderr).splitlines()
    if done.returncode or not program.is_file():
        errors = (line.partition("error: ")[2] for line in reversed(messages) if "error: " in line)
        return f"bishengir-compile: {next(errors, f'exit status {done.returncode}')}"
    dropped = any("compilation then succeeded" in line and "auto-multi-buffer to false" in line for line in messages)
    buffered = "--enable-auto-multi-buffer=True" in command and not dropped
    return {"program": program.read_text(encoding="utf-8"), "multi_buffered": buffered}
