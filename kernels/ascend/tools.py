"""Ascend's compilers from the package index, in a folder of their own.

triton-ascend is upstream's package `triton` with another backend inside: in an environment of its own it would
overwrite Triton, so it is unpacked beside it and put on the path of a program that lowers, no other.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from npu_rec.errors import DeviceError

PACKAGES = ("triton-ascend==3.2.0", "ascendnpu-ir==1.2.0", "pybind11<4", "numpy==2.2.6")
VARIABLE = "NPU_REC_ASCEND_TOOLS"
_MARK = {"triton", "pybind11"}  # a folder with these is one of ours, whatever else is damaged


def folder() -> Path:
    """Where the compilers are, or would be."""
    given = os.environ.get(VARIABLE)
    return (Path(given).expanduser() if given else Path(sys.prefix, "ascend-tools")).resolve()


def unavailable() -> str | None:
    """Why the compilers cannot be used, in one line; None when they can."""
    if unsupported() is not None:
        return unsupported()
    whole = all(os.access(compiler(suffix), os.X_OK) for suffix in ("", "-a5"))
    if not whole or not (folder() / "triton" / "backends" / "ascend").is_dir():
        return f"Ascend's compilers are not in {folder()}; `npu-rec lower --install` puts them there (800 MB)"
    return None


def unsupported() -> str | None:
    """Why they could not run here even if installed; None when they could."""
    if sys.version_info[:2] > (3, 11):
        return f"triton-ascend 3.2.0 is built for Python up to 3.11, this is {platform.python_version()}"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"Ascend's compilers are built for Linux on x86_64 and aarch64, this is {platform.platform()}"
    return None


def install() -> None:
    """Install the compilers unless they are there.

    Raises:
        DeviceError: they cannot run here, the folder holds something else, or pip failed.
    """
    if unavailable() is None:
        return
    if unsupported() is not None:
        raise DeviceError(str(unsupported()))
    target = folder()
    if target.exists() and not _MARK.issubset(_names(target)) and _names(target):
        raise DeviceError(f"{target} holds something else; name an empty folder, or none yet, in {VARIABLE}")
    print(f"installing {', '.join(PACKAGES)} into {target}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as temporary:
        partial = Path(temporary, "tools")  # renamed when whole
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), *PACKAGES]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise DeviceError(f"pip could not install Ascend's compilers into {target} (its messages are above)")
        for program in (partial / "ascendnpuir" / "bin").iterdir():
            program.chmod(0o755)  # the wheel loses the mode
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)


def _names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}


def compiler(suffix: str) -> Path:
    """`bishengir-compile` for A2 and A3 (suffix ""), or for the 950 family ("-a5")."""
    return folder() / "ascendnpuir" / "bin" / f"bishengir-compile{suffix}"
