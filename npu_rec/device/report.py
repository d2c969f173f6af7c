"""The facts about a machine that `npu-rec doctor` prints."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from npu_rec.device import ascend
from npu_rec.device.ascend import first_line
from npu_rec.device.selection import BACKENDS, Backend, auto

_VARIABLES = re.compile(
    r"ASCEND_.*|HCCL_.*|CUDA_VISIBLE_DEVICES|PYTORCH_NPU_ALLOC_CONF|OMP_NUM_THREADS|NPU_REC_.*|TORCH_DEVICE_BACKEND_AUTOLOAD"
)


def device_report() -> dict[str, Any]:
    """Devices, versions, environment and compiler of this machine; JSON-able.

    Returns:
        `selected`: the device that `auto` takes. `devices`: for ascend, cuda and cpu either `available` true with
        `name`, `count`, `memory_bytes` and `profile`, or `available` false with a `reason`. `versions`: name to
        version, None where it is not installed or not readable. `environment`: the variables that matter and are set.
        `compiler`: the C++ compiler, or None.
    """
    environment = {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)}
    return {
        "selected": auto(),
        "devices": {name: _describe(backend) for name, backend in BACKENDS.items()},
        "versions": {
            "python": platform.python_version(),
            **{name: _installed(name) for name in ("torch", "torch_npu", "triton", "triton-ascend")},
            "torch_npu": _installed("torch_npu") or ascend.module_version(),
            "cann": _cann_version(),
            "ascend_driver": _driver_version(),
        },
        "environment": environment,
        "compiler": _compiler(),
    }


def _describe(backend: Backend) -> dict[str, Any]:
    reason = backend.probe.unavailable()
    if reason:
        return {"available": False, "reason": reason}
    try:
        profile = backend.probe.profile(0)
    except Exception as error:  # A card that is listed but does not start must not hide the rest of the report.
        return {"available": False, "reason": f"the device does not start: {first_line(error)}"}
    return {
        "available": True,
        "name": profile.chip,
        "count": backend.probe.count(),
        "memory_bytes": profile.memory_bytes,
        "profile": profile.as_dict(),
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cann_version() -> str | None:
    """From the files that CANN's installer leaves; `version_dir` is the release, `Version` a component's own number."""
    home = os.environ.get("ASCEND_HOME_PATH")
    files = (f"{platform.machine()}-linux/ascend_toolkit_install.info", "toolkit/version.info", "opp/version.info")
    for file in files if home else ():
        try:
            text = Path(str(home), file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for key in ("version_dir", "version"):
            match = re.search(rf"^{key}=(.+)$", text, re.MULTILINE | re.IGNORECASE)
            if match:
                return match[1].strip()
    return None


def _driver_version() -> str | None:
    match = re.search(r"Version:\s*(\S+)", _output("npu-smi", "info"))
    return match[1] if match else None


def _compiler() -> str | None:
    for command in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(command)
        if path:
            return f"{path}: {next(iter(_output(path, '--version').splitlines()), 'version unknown')}"
    return None


def _output(*command: str) -> str:
    """What a command prints; nothing if it is absent, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
