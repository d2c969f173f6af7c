"""Loading the packages with Ascend's operators: once torch_npu is in use, with the reason where one does not load."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vendor_standins import registered
from vendor_standins_small import LN_MUL

from npu_rec.device import ascend
from npu_rec.ops.norm_gate_vendor import LN_MUL as OPERATOR
from npu_rec.ops.vendor_support import vendor_operator


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages on a machine where torch_npu is in use."""
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    monkeypatch.setattr(ascend, "unavailable", lambda: None)
    monkeypatch.setattr(ascend.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    ascend._load_vendor_packages.cache_clear()
    yield tmp_path
    ascend._load_vendor_packages.cache_clear()
    for package in ascend.VENDOR_PACKAGES:
        if package != "torch_npu":
            sys.modules.pop(package, None)


def package(site: Path, name: str, source: str) -> None:
    (site / f"{name}.py").write_text(source)


def test_nothing_is_loaded_before_torch_npu_is_in_use() -> None:
    assert ascend.vendor_package_problems() == dict.fromkeys(ascend.VENDOR_PACKAGES, "is for Ascend NPUs")


def test_absent_packages_come_with_advice(site: Path) -> None:
    assert ascend.vendor_package_problems() == {
        "rec_ops": "is not installed; build cust_op of github.com/Ascend/RecSDK",
        "ops_rec": "is not installed; pip install ops_rec",
        "fbgemm_ascend": "is not installed; pip install fbgemm_ascend",
    }
    assert OPERATOR.unusable() == "no ops_rec::ln_mul: ops_rec is not installed; pip install ops_rec"


def test_a_package_that_does_not_load_keeps_its_reason_and_hides_no_other(site: Path) -> None:
    package(site, "ops_rec", "raise OSError('libpython3.11.so.1.0: cannot open shared object file\\nmore')")
    package(site, "fbgemm_ascend", "LOADED = True")
    problems = ascend.vendor_package_problems()
    assert problems["ops_rec"] == "does not load: OSError: libpython3.11.so.1.0: cannot open shared object file"
    assert "fbgemm_ascend" not in problems
    assert sys.modules["fbgemm_ascend"].LOADED is True


def test_a_package_that_only_warns_is_found_out_by_its_operator(site: Path) -> None:
    package(site, "ops_rec", "import warnings")
    assert OPERATOR.unusable() == "no ops_rec::ln_mul: ops_rec is loaded, but has none"
    with registered(*LN_MUL):
        assert OPERATOR.unusable(torch.zeros(1)) is None


def test_the_library_that_recsdks_build_leaves_is_loaded_by_its_path(site: Path) -> None:
    (site / "libfbgemm_npu_api.so").write_text("no library")
    reason = ascend.vendor_package_problems()["rec_ops"]
    assert reason.startswith("does not load: OSError: ")
    assert "libfbgemm_npu_api.so" in reason


def test_packages_are_loaded_once(site: Path) -> None:
    package(site, "ops_rec", "import sys; sys.loads = getattr(sys, 'loads', 0) + 1; raise ImportError('no')")
    for _ in range(3):
        ascend.vendor_package_problems()
    assert sys.loads == 1  # type: ignore[attr-defined]
    del sys.loads  # type: ignore[attr-defined]


def test_an_unknown_operator_of_a_known_package_is_named() -> None:
    operator = vendor_operator("rec_ops", "mxrec::no_such_operator", x="Tensor")
    assert operator.unusable() == "no mxrec::no_such_operator: rec_ops is for Ascend NPUs"
    assert not operator.registered


def test_importing_the_operators_loads_no_vendor_package() -> None:
    program = "import npu_rec.ops, sys; print([m for m in ('torch_npu', 'ops_rec', 'fbgemm_gpu') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
