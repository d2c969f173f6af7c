"""Compiles csrc/ into one library, once for each torch and each state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

FOLDER = Path(__file__).resolve().parent
CACHE = FOLDER.parents[1] / "build" / "fake_npu"
TORCH = torch.__version__.split("+")[0]
VERSION = f"{'.'.join(TORCH.split('.')[:2])}.0+stand.in"  # fits this torch, and tells reports what it is


def compiler() -> str | None:
    """The C++ compiler; None when there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """The shared library, built when that has not been done; two processes do not build at the same time."""
    files = sorted([*FOLDER.glob("csrc/*.h"), *FOLDER.glob("csrc/*.cpp")])
    digest = hashlib.sha256(torch.__version__.encode())
    for file in files:
        digest.update(file.read_bytes())
    target = CACHE / f"libfake_npu-{TORCH}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile([file for file in files if file.suffix == ".cpp"], target)
    return target


def _compile(sources: list[Path], target: Path) -> None:
    # one translation unit: PyTorch's headers, which cost most of the time, are read once
    unit = "".join(f'#include "{source}"\n' for source in sources)
    libraries = Path(torch.__file__).parent / "lib"
    command = [
        str(compiler()), "-x", "c++", "-", "-std=c++20", "-O0", "-w", "-fPIC", "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in include_paths()),
        f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}", "-o", f"{target}.partial",
    ]  # fmt: skip
    done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the fake npu does not compile:\n{done.stderr[-4000:]}")
    Path(f"{target}.partial").rename(target)


def metadata() -> Path:
    """A folder with the metadata of an installed torch_npu: its version, the entry point by which torch loads it."""
    folder = CACHE / f"metadata-{VERSION}"
    if not folder.exists():
        partial = CACHE / f"metadata-{os.getpid()}"
        info = partial / f"torch_npu-{VERSION}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {VERSION}\n")
        (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
        partial.rename(folder)
    return folder
