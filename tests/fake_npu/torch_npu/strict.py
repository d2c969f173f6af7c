"""Strict mode: hands the lists of operators to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

OPERATORS = Path(__file__).resolve().parents[1] / "operators"
_JAGGED = "_nested_view_from_jagged"
_library = torch.library.Library("aten", "IMPL")


def enable() -> None:
    """Refuse operators that are not reviewed, and those that are known not to run on Ascend."""
    rules = unsupported()
    torch.ops.fake_npu.set_strict(reviewed(), list(rules), list(rules.values()))

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(f"fake npu, strict: {_JAGGED} does not run on Ascend: {rules[_JAGGED]}")

    # PyTorch makes a jagged nested tensor without asking for a kernel of its device: refused here, on every device
    _library.impl(_JAGGED, refuse, "AutogradNestedTensor")


def reviewed() -> list[str]:
    """The operators that may run."""
    lines = (OPERATORS / "reviewed.txt").read_text().splitlines()
    return [name for line in lines for name in line.partition("#")[0].split()]


def unsupported() -> dict[str, str]:
    """`operator` or `operator/dtype` -> the source that says so."""
    rules = {}
    for entry in yaml.safe_load((OPERATORS / "unsupported.yaml").read_text()):
        for operator in entry["operators"]:
            for dtype in entry.get("dtypes", [None]):
                rules[f"{operator}/{dtype}" if dtype else operator] = entry["source"]
    return rules
