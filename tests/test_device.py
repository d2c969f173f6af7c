"""The device layer: its CPU contract, and what it says about devices that cannot be used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from npu_rec.device import CAPABILITIES, HardwareProfile, ascend, cuda, device_report, get_device
from npu_rec.device.profile import ASCEND_CHIPS, ascend_profile
from npu_rec.errors import DeviceError

REPOSITORY = Path(__file__).resolve().parents[1]
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
MINOR = ".".join(torch.__version__.split(".")[:2])
NO_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"

no_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available() or importlib.util.find_spec("torch_npu") is not None,
    reason="presumes a machine without an accelerator",
)


def write_torch_npu(folder: Path, source: str, version: str = f"{MINOR}.0") -> None:
    """A stand-in for the torch_npu distribution, with the entry point by which torch loads it."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(source)
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")


def python(program: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with `path` importable, as in a fresh shell."""
    kept = {name: value for name, value in os.environ.items() if name not in (AUTOLOAD, "LOCAL_RANK")}
    kept |= {"PYTHONPATH": os.pathsep.join([str(path), str(REPOSITORY)])} | environment
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def torch_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a stand-in for torch_npu into this process."""

    def install(source: str, version: str = f"{MINOR}.0") -> None:
        write_torch_npu(tmp_path, source, version)
        monkeypatch.syspath_prepend(tmp_path)
        ascend.unavailable.cache_clear()

    monkeypatch.setenv(AUTOLOAD, "0")
    yield install
    sys.modules.pop("torch_npu", None)
    ascend.unavailable.cache_clear()


def test_cpu_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0,1,2,3")  # Cards only: a CPU has one index.
    device = get_device("cpu")
    assert (device.name, device.torch_device, device.dispatch_key) == ("cpu", torch.device("cpu"), "CPU")
    assert (device.collective_backend, device.visible_devices_variable) == ("gloo", None)
    assert device.profile.chip
    assert device.profile.logical_cores == os.cpu_count()
    assert device.profile.memory_bytes
    assert device.profile.memory_bytes > 2**28
    assert device.profile.cube_cores is None
    assert device.profile.ub_bytes is None
    device.synchronize()
    device.reset_peak_memory()
    assert device.memory_allocated() is device.max_memory_allocated() is device.rng_state() is None
    device.set_rng_state(None)
    assert device.profiler_activities() == [torch.profiler.ProfilerActivity.CPU]
    assert device == get_device("cpu")
    assert hash(device) == hash(get_device("cpu"))


def test_cpu_seed_autocast_and_threads() -> None:
    device = get_device("cpu")
    device.manual_seed(3)
    first = torch.rand(4)
    device.manual_seed(3)
    assert torch.equal(first, torch.rand(4))
    matrix = torch.ones(4, 4)
    with device.autocast(torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with device.autocast(None):
        assert (matrix @ matrix).dtype == torch.float32
    before = torch.get_num_threads()
    try:
        device.set_threads(1)
        device.set_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@no_accelerator
@pytest.mark.parametrize(("name", "advice"), [("ascend", f'pip install "torch_npu=={MINOR}.*"'), ("cuda", "CUDA")])
def test_absent_device_is_one_line(name: str, advice: str) -> None:
    with pytest.raises(DeviceError, match=f"^device {name} cannot be used: ") as caught:
        get_device(name)  # type: ignore[arg-type]
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cuda_without_a_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    with pytest.raises(DeviceError, match=r"sees no GPU; check that `nvidia-smi`.*it is '9'"):
        get_device("cuda")


def test_cuda_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(name="H100", multi_processor_count=132, total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert cuda.profile(0) == HardwareProfile(
        "H100", multiprocessors=132, memory_bytes=80 << 30, capabilities=frozenset({"sm90"})
    )


def test_unknown_device() -> None:
    with pytest.raises(DeviceError, match="unknown device 'tpu': choose auto, ascend, cuda, cpu"):
        get_device("tpu")  # type: ignore[arg-type]


@no_accelerator
def test_auto_is_cpu_here(caplog: pytest.LogCaptureFixture) -> None:
    assert get_device("auto").name == "cpu"
    assert not caplog.records


@no_accelerator
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (NO_CANN, ["CANN is not on the library path", "libhccl.so", "source /usr/local/Ascend/cann/set_env.sh"]),
        ("raise OSError('libascendcl.so: cannot open shared object file')", ["CANN is not", "libascendcl.so"]),
        ("raise ImportError('libascend_hal.so: cannot open shared object file')", ["driver", "libascend_hal.so"]),
        (
            r"raise RuntimeError('Two accelerators cannot be used at once: npu and cuda.\n[ERROR] ERR00007 PTA')",
            ["ERR00007", "pip install torch==", "--index-url https://download.pytorch.org/whl/cpu"],
        ),
        (r"raise RuntimeError('something else\nlong')", ["importing torch_npu failed: RuntimeError: something else"]),
        ("class npu:\n    device_count = lambda: 0", ["no NPU is visible", "npu-smi", "it is '7'"]),
        ("class npu:\n    device_count = lambda: 1 // 0", ["cannot count the NPUs: ZeroDivisionError"]),
    ],
)
def test_ascend_diagnosis(
    source: str, said: list[str], torch_npu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7")
    torch_npu(source)
    with pytest.raises(DeviceError) as caught:
        get_device("ascend")
    assert all(part in str(caught.value) for part in said)
    assert "\n" not in str(caught.value)


@no_accelerator
def test_ascend_for_another_torch_is_not_even_imported(torch_npu: Callable[..., None]) -> None:
    torch_npu("raise SystemExit", version="1.11.0.post3")
    with pytest.raises(DeviceError, match=rf"torch_npu 1\.11\.0\.post3 does not fit torch .*torch_npu=={MINOR}\.\*"):
        get_device("ascend")


@no_accelerator
def test_auto_warns_about_a_broken_ascend(torch_npu: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    torch_npu(NO_CANN)
    assert get_device("auto").name == "cpu"
    assert "passes over ascend" in caplog.text
    assert "CANN" in caplog.text


@no_accelerator
def test_broken_torch_npu_does_not_break_torch(tmp_path: Path) -> None:
    write_torch_npu(tmp_path, NO_CANN)
    plain = python("import torch", tmp_path)
    assert plain.returncode
    assert "Failed to load the backend extension: torch_npu" in plain.stderr

    program = """
import npu_rec
import torch
from npu_rec.device import get_device
from npu_rec.errors import DeviceError
assert get_device("auto").name == "cpu"
try:
    get_device("ascend")
except DeviceError as error:
    print(error)
"""
    result = python(program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "CANN is not on the library path" in result.stdout


FAKE_NPU = """
import types
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

npu = types.ModuleType("torch_npu.npu")
npu.states = [torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)]
npu.is_available = lambda: True
npu.device_count = lambda: 2
npu.get_device_name = lambda index: "Ascend910B2"
npu.get_device_properties = lambda index: types.SimpleNamespace(total_memory=64 << 30, cube_core_num=12)
npu.get_rng_state = lambda device: npu.states[device.index]
npu.set_rng_state = lambda state, device: npu.states.__setitem__(device.index, state)
npu.get_amp_supported_dtype = lambda: [torch.bfloat16]
_setup_privateuseone_for_python_backend("npu", backend_module=npu)
_autoload = lambda: None
"""


@no_accelerator
@pytest.mark.parametrize(("rank", "error"), [("1", ""), ("2", "this process sees 2 npu"), ("0,1", "torchrun")])
def test_ascend_device(rank: str, error: str, tmp_path: Path) -> None:
    """A working device named npu, in a process of its own: the name can be given once."""
    write_torch_npu(tmp_path, FAKE_NPU)
    program = """
import os, torch
from npu_rec.device import get_device
device = get_device("auto")
assert (device.name, device.torch_device, device.dispatch_key) == ("ascend", torch.device("npu:1"), "PrivateUse1")
assert (device.collective_backend, device.visible_devices_variable) == ("hccl", "ASCEND_RT_VISIBLE_DEVICES")
profile = device.profile
assert (profile.chip, profile.memory_bytes, profile.ub_bytes) == ("Ascend910B2", 64 << 30, 192 << 10)
assert (profile.cube_cores, profile.vector_cores) == (12, 48)
assert device.rng_state().item() == 1
device.set_rng_state(torch.tensor([9], dtype=torch.uint8))
assert device.rng_state().item() == 9
with device.autocast(torch.bfloat16):
    assert torch.is_autocast_enabled("npu")
assert torch.profiler.ProfilerActivity.PrivateUse1 in device.profiler_activities()
assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
"""
    result = python(program, tmp_path, LOCAL_RANK=rank)
    if error:
        assert result.returncode
        assert error in result.stderr.splitlines()[-1]
    else:
        assert result.returncode == 0, result.stderr


def test_table_of_ascend_chips() -> None:
    kib = 1024
    for chip, known in ASCEND_CHIPS.items():
        profile = ascend_profile(chip, memory_bytes=1)
        assert (profile.chip, profile.memory_bytes, profile.cube_cores) == (chip, 1, known.cube_cores)
        assert known.capabilities <= set(CAPABILITIES)
        assert known.vector_cores == 2 * (known.cube_cores or 0)
    b4, a3, a5 = (ASCEND_CHIPS[chip] for chip in ("Ascend910B4", "Ascend910_9391", "Ascend950PR_9589"))
    assert (b4.cube_cores, a3.cube_cores, a5.cube_cores) == (20, 24, 32)
    assert (a3.ub_bytes, a3.l1_bytes, a3.l0a_bytes, a3.l0c_bytes) == (192 * kib, 512 * kib, 64 * kib, 128 * kib)
    assert (a5.ub_bytes, a5.l1_bytes, a5.l0a_bytes, a5.l0c_bytes) == (248 * kib, None, None, 256 * kib)
    assert ascend_profile("Ascend310P3") == HardwareProfile("Ascend310P3")


def test_profile_as_dict_leaves_out_the_unknown() -> None:
    assert HardwareProfile("X", cube_cores=2).as_dict() == {"chip": "X", "cube_cores": 2, "capabilities": []}


def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "opp").mkdir()
    (tmp_path / "opp" / "version.info").write_text("Version=7.7.0.1\nversion_dir=8.5.0\n")
    smi = tmp_path / "npu-smi"
    smi.write_text("#!/bin/sh\necho '| npu-smi 24.1.0        Version: 24.1.0        |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("UNRELATED", "1")
    report = json.loads(json.dumps(device_report()))
    assert report["devices"]["cpu"]["available"]
    assert report["devices"]["cpu"]["memory_bytes"]
    assert report["selected"] in report["devices"]
    for device in report["devices"].values():
        assert device["available"] or "\n" not in device["reason"]
    assert report["versions"]["torch"] == torch.__version__
    assert (report["versions"]["cann"], report["versions"]["ascend_driver"]) == ("8.5.0", "24.1.0")
    assert report["environment"]["ASCEND_RT_VISIBLE_DEVICES"] == "0,1"
    assert "UNRELATED" not in report["environment"]
