"""The rule of floors (docs/architecture.md): imports run downward only, and the hardware is asked in one place."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "npu_rec"
SOURCES = sorted(
    path
    for folder in ("npu_rec", "kernels", "launch", "docs")
    for path in (REPOSITORY / folder).rglob("*.py")
    if PACKAGE / "device" not in path.parents
)
HARDWARE = ("cuda", "npu")


def mentions(source: str) -> list[str]:
    """Where code (not docstrings, not comments) touches `torch.cuda`, `torch.npu` or `torch_npu`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[-1], ast.Constant):
            called, argument = ast.unparse(node.func), str(node.args[-1].value)
            if called in ("getattr", "hasattr") and ast.unparse(node.args[0]) == "torch":
                names = [f"torch.{argument}"]
            elif called.rpartition(".")[2] in ("import_module", "__import__", "find_spec"):
                names = [argument]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch_npu" or (parts[0] == "torch" and parts[1:2] and parts[1] in HARDWARE):
                found.append(f"{node.lineno}: {name}")  # type: ignore[attr-defined]
    return found


def test_imports_run_downward_only() -> None:
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed (pip install -e '.[dev]')")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    run = subprocess.run(
        [*command, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Contracts: 2 kept, 0 broken." in run.stdout


def test_every_part_of_the_package_has_a_floor() -> None:
    linter = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = {name.strip() for layer in linter["contracts"][0]["layers"] for name in layer.split("|")}
    parts = {f"npu_rec.{path.stem}" for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    parts |= {f"npu_rec.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert parts <= floors
    assert floors <= parts


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(REPOSITORY)) for path in SOURCES])
def test_only_the_device_layer_names_the_hardware(path: Path) -> None:
    assert mentions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.synchronize()",
        "import torch\nx = torch.npu",
        "import torch.cuda",
        "from torch import cuda",
        "from torch.cuda import amp",
        "import torch_npu",
        "from torch_npu.contrib import x",
        "getattr(torch, 'npu')",
        "import importlib\nimportlib.import_module('torch_npu')",
    ],
)
def test_each_way_of_naming_the_hardware_is_seen(source: str) -> None:
    assert mentions(source)


def test_documentation_and_other_names_are_not_code() -> None:
    assert (
        mentions('"""Not torch.cuda, nor torch_npu."""\nimport torch  # torch.cuda\nx.cuda = torch.device("cuda")')
        == []
    )
    assert any(mentions(path.read_text(encoding="utf-8")) for path in (PACKAGE / "device").glob("*.py"))
