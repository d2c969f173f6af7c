"""Ascend NPUs through torch_npu, which is imported here alone and only when Ascend is asked for.

`import npu_rec` keeps torch from importing torch_npu by itself (TORCH_DEVICE_BACKEND_AUTOLOAD=0): where CANN is
missing that fails, and `import torch` with it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from npu_rec.device.profile import HardwareProfile, ascend_profile

# What libtorch_npu.so links from CANN; the driver's library comes in through them.
_CANN_LIBRARIES = {"libhccl.so", "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so"}
_DRIVER_LIBRARY = "libascend_hal.so"

# Packages that bring fused operators, and how each is installed.
VENDOR_PACKAGES = {
    "torch_npu": "pip install torch_npu",
    "rec_ops": "build cust_op of github.com/Ascend/RecSDK",
    "ops_rec": "pip install ops_rec",
    "fbgemm_ascend": "pip install fbgemm_ascend",
}
_REC_OPS_LIBRARY = "libfbgemm_npu_api.so"  # what RecSDK's build leaves in site-packages


def installed() -> bool:
    """Whether torch_npu is there at all, usable or not."""
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


@functools.cache  # A failed import leaves parts of torch_npu behind; a second try would report something else.
def unavailable() -> str | None:
    """Import torch_npu and look for a card. Why Ascend cannot be used here, in one line; None when it can."""
    fitting = f'pip install "torch_npu=={_minor(torch.__version__)}.*"'
    if not installed():
        return f"torch_npu is not installed; install the driver and CANN, then {fitting} for torch {torch.__version__}"
    version = _version()
    if version and _minor(version) != _minor(torch.__version__):
        return f"torch_npu {version} does not fit torch {torch.__version__}; {fitting}"
    try:
        torch_npu = importlib.import_module("torch_npu")
    except Exception as error:  # ImportError, OSError and RuntimeError all occur, whatever is wrong.
        return _diagnose(error)
    # Now that it loads, child processes (torch.compile's workers) may load it the way torch does by default.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    try:
        visible = torch_npu.npu.device_count()
    except Exception as error:
        return f"torch_npu {version} cannot count the NPUs: {first_line(error)}"
    if visible == 0:
        mask = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        return (
            "torch_npu and CANN load, but no NPU is visible; check that `npu-smi info` lists one and that "
            f"ASCEND_RT_VISIBLE_DEVICES does not hide it (it {'is not set' if mask is None else f'is {mask!r}'})"
        )
    return None


def vendor_package_problems() -> dict[str, str]:
    """For each of `VENDOR_PACKAGES` what is wrong with it; none is loaded before torch_npu is in use."""
    if "torch_npu" not in sys.modules or unavailable() is not None:
        return dict.fromkeys(VENDOR_PACKAGES, "is for Ascend NPUs")
    return _load_vendor_packages()


@functools.cache
def _load_vendor_packages() -> dict[str, str]:
    """Load the packages that are installed; never raises. A package absent from the answer was loaded.

    That says little: ops_rec only warns when its library does not load, so ask for the operator itself.
    """
    problems = {}
    for package, advice in VENDOR_PACKAGES.items():
        library = Path(sysconfig.get_path("purelib"), _REC_OPS_LIBRARY)
        in_library = package == "rec_ops" and library.exists()
        if not in_library and package not in sys.modules and importlib.util.find_spec(package) is None:
            problems[package] = f"is not installed; {advice}"
            continue
        try:
            torch.ops.load_library(library) if in_library else importlib.import_module(package)
        except Exception as error:  # a library for another torch or chip, a missing libpython, ...
            problems[package] = f"does not load: {first_line(error)}"
    return problems


def count() -> int:
    """NPUs that this process sees."""
    return int(_npu().device_count())


def profile(index: int) -> HardwareProfile:
    """The NPU of that index."""
    properties = _npu().get_device_properties(index)
    return ascend_profile(
        _npu().get_device_name(index),
        memory_bytes=getattr(properties, "total_memory", None),
        cube_cores=getattr(properties, "cube_core_num", None),
        vector_cores=getattr(properties, "vector_core_num", None),
    )


def _npu() -> Any:
    return importlib.import_module("torch_npu").npu


def _version() -> str | None:
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None


def module_version() -> str | None:
    """What the loaded torch_npu says of itself; None when none is loaded."""
    return getattr(sys.modules.get("torch_npu"), "__version__", None)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def first_line(error: Exception) -> str:
    """An exception on one line; torch_npu's messages have many."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _diagnose(error: Exception) -> str:
    """What a failed import of torch_npu means."""
    text = str(error)
    missing = re.search(r"(lib\w+\.so)\S*: cannot open shared object", text)
    if missing and missing[1] in _CANN_LIBRARIES:
        return (
            f"torch_npu is installed, but CANN is not on the library path ({missing[1]} not found); "
            "source /usr/local/Ascend/cann/set_env.sh (or ascend-toolkit/set_env.sh), or install CANN"
        )
    if missing and missing[1] == _DRIVER_LIBRARY:
        return (
            f"CANN is found, but the Ascend driver is not on the library path ({_DRIVER_LIBRARY} not found); "
            "install the driver, or mount /usr/local/Ascend/driver into the container"
        )
    if "ERR00007" in text:
        return (
            f"torch {torch.__version__} is a build for another accelerator, and torch_npu cannot share a process with "
            f"it (ERR00007); pip install torch=={torch.__version__.split('+')[0]} "
            "--index-url https://download.pytorch.org/whl/cpu"
        )
    return f"importing torch_npu failed: {first_line(error)}"
