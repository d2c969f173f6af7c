"""What the self-test says of operators that are wrong, raise or refuse."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_rec.ops.norm_gate_reference as reference
from npu_rec import cli
from npu_rec.bench.selftest import markdown, operators, run
from npu_rec.device import get_device
from npu_rec.ops import OPERATORS, Backend

CPU = get_device("cpu")


def test_every_operator_has_cases() -> None:
    assert set(operators.CASES) == set(OPERATORS)


def norm_gate_backend(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Backend:
    """A copy of the reference, changed, and registered."""
    backend = replace(reference.BACKEND, name="changed", **changes)
    monkeypatch.setattr(OPERATORS["norm_gate"], "backends", [backend, reference.BACKEND])
    return backend


def off(share: float, names: slice) -> Callable[..., tuple[Tensor | None, ...]]:
    """The reference's backward pass with some gradients off by a share."""

    def backward(request: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = list(reference.BACKEND.backward(request, grad))
        grads[names] = [None if g is None else g * (1 + share) for g in grads[names]]
        return tuple(grads)

    return backward


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        (
            {"forward": lambda request: reference.BACKEND.forward(request) * 1.01},
            r"1.0e-02 .* 1.0e-04 allowed \(.*, out\)",
        ),
        ({"backward": off(0.01, slice(1, 2))}, r"1.0e-02 .*gradient of gate\)"),
        ({"backward": off(0.01, slice(3, 4))}, r"1.0e-02 .*gradient of bias\)"),
        ({"forward": lambda request: reference.BACKEND.forward(request) + float("nan")}, "worst error inf"),
    ],
)
def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], seen: str) -> None:
    check = operators.of_backend("norm_gate", norm_gate_backend(monkeypatch, **changes), CPU)[0]
    assert (check.name, check.status, check.traceback) == ("norm_gate changed float32", "failed", None)
    assert re.search(seen, check.detail), check.detail


def test_relative_error() -> None:
    right = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert operators.relative_error(torch.tensor([1.0, -4.0]), right) == 0
    assert operators.relative_error(torch.tensor([1.5, -3.0]), right) == 0.25
    assert operators.relative_error(torch.zeros(3), right) == float("inf")
    assert operators.relative_error(torch.zeros(0), right[:0]) == 0
    assert operators.relative_error(torch.zeros(2), 0 * right) == 0
    assert operators.relative_error(torch.ones(2), 0 * right) > 1e300


def test_an_unchanged_backend_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = operators.of_backend("norm_gate", norm_gate_backend(monkeypatch), CPU)
    assert [check.status for check in checks] == ["passed"] * 3


@pytest.mark.parametrize(
    ("name", "part", "status"),
    [
        ("changed", "forward", "failed"),
        ("changed", "backward", "failed"),
        ("reference", "forward", "failed"),
        ("reference", "backward", "passed"),
    ],
)
def test_other_bits_each_time_are_told(monkeypatch: pytest.MonkeyPatch, name: str, part: str, status: str) -> None:
    calls = iter(range(10**6))

    def forward(request: Any) -> Tensor:
        out: Tensor = reference.BACKEND.forward(request)
        return out * (1 + 1e-6 * (next(calls) % 2))

    def backward(request: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return off(1e-6 * (next(calls) % 2), slice(0, 1))(request, grad)

    operators.expectations("norm_gate", torch.float32)  # of the reference as it is
    backend = norm_gate_backend(monkeypatch, **{part: {"forward": forward, "backward": backward}[part]})
    backend = replace(backend, name=name)
    monkeypatch.setattr(OPERATORS["norm_gate"], "backends", [backend])
    check = operators.of_backend("norm_gate", backend, CPU)[0]
    assert check.status == status
    changing = "out" if part == "forward" else "gradient of x"
    assert check.detail.endswith(f"the same call twice gave other bits: {changing}")


def test_a_backend_that_raises_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(request: Any) -> Tensor:
        raise RuntimeError(f"error 507011 in {Path.home()}/kernel.o\nand more")

    norm_gate_backend(monkeypatch, forward=forward)
    monkeypatch.setattr(operators, "OPERATORS", {name: OPERATORS[name] for name in ("norm_gate", "swiglu")})
    result = run(CPU, ["operators"], lambda result: None)
    assert [check.status for check in result.checks[:3]] == ["failed"] * 3
    assert result.checks[0].detail == "RuntimeError: error 507011 in ~/kernel.o"
    assert "in forward" in str(result.checks[0].traceback)
    assert result.checks[-1].name == "swiglu reference float16"
    assert all(check.status != "failed" for check in result.checks[3:])
    report = markdown(result)
    assert report.startswith(f"# npu-rec self-test on cpu: 3 of {len(result.checks)} checks failed")
    assert "## Failures\n\n### operators: norm_gate changed float32\n\nRuntimeError: error 507011" in report
    assert "and more" in report.partition("```json")[2]


def test_a_backend_that_refuses_is_skipped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = operators.of_backend(
        "norm_gate", norm_gate_backend(monkeypatch, supports=lambda request: "too hot"), CPU
    )
    assert (check.name, check.status, check.detail) == ("norm_gate changed", "skipped", "too hot")


def test_refused_shapes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = lambda request: "odd width" if request.x.shape[1] % 2 else None  # noqa: E731
    check = operators.of_backend("norm_gate", norm_gate_backend(monkeypatch, supports=refuse), CPU)[0]
    assert check.status == "passed"
    assert check.detail.endswith("2 shapes not supported: odd width")
    assert check.figures["unsupported_shapes"] == 2


def test_a_failure_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    norm_gate_backend(monkeypatch, backward=off(0.01, slice(0, 1)))
    monkeypatch.setattr(operators, "OPERATORS", {"norm_gate": OPERATORS["norm_gate"]})
    out = tmp_path / "report.md"
    arguments = ["npu-rec", "selftest", "--device", "cpu", "--only", "operators", "--out", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["failed"] == 2  # bfloat16, of 8 bits, does not see 1 %
    assert printed.err.splitlines()[-1] == f"failed: 2 of 6 checks failed; the report is {out}"
    assert "| norm_gate changed float32 | **failed** |" in out.read_text(encoding="utf-8")
