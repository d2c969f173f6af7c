"""`npu-rec selftest`: passes here and on the fake npu; its report, its losses, its collectives."""

from __future__ import annotations

import json
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import npu_rec
from fake_npu.harness import needs_fake_npu, npu_rec_on_npu

from npu_rec import cli
from npu_rec.bench.selftest import Result, collective_worker, collectives, markdown, operators, run, speed, training
from npu_rec.bench.selftest.check import CheckFailed, guarded
from npu_rec.bench.selftest.run import SECTIONS
from npu_rec.bench.selftest.scrub import PACKAGE, scrub
from npu_rec.device import get_device
from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS

CPU = get_device("cpu")
EVERY_SECTION = ("operators", "training", "collectives", "speed")


def everything(report: str) -> dict[str, Any]:
    """The JSON block at the end."""
    (block,) = re.findall(r"^```json\n(.*?)\n```$", report, re.DOTALL | re.MULTILINE)
    document: dict[str, Any] = json.loads(block, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return document


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The document, the report and stderr of a run of the command on the CPU."""
    folder = tmp_path_factory.mktemp("selftest")
    done = npu_rec("selftest", "--device", "cpu", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["report"] == "npu-rec-selftest.md"
    return document, (folder / "npu-rec-selftest.md").read_text(encoding="utf-8"), done.stderr


def test_passes_on_the_cpu(on_cpu: tuple[dict[str, Any], str, str]) -> None:
    document, _, told = on_cpu
    assert document["device"] == "cpu"
    assert document["failed"] == 0
    assert document["passed"] + document["skipped"] == len(document["checks"]) == len(told.splitlines())
    passed = {(check["section"], check["name"]) for check in document["checks"] if check["status"] == "passed"}
    assert {section for section, _ in passed} == set(EVERY_SECTION)
    for name in OPERATORS:
        for dtype in ("float32", "bfloat16", "float16"):
            assert ("operators", f"{name} reference {dtype}") in passed
    for name in collectives.NAMES:
        assert ("collectives", name) in passed
    assert len([name for section, name in passed if section == "training"]) == 4


def test_its_figures(on_cpu: tuple[dict[str, Any], str, str]) -> None:
    figures = {check["name"]: check["figures"] for check in on_cpu[0]["checks"]}
    attention = figures["hstu_attention tiled float32"]
    assert attention["shapes"] == len(operators.CASES["hstu_attention"]()) >= 20
    assert 0 < attention["worst_error"] < 1e-5
    assert figures["processes start and end"]["processes"] == 2
    assert figures["bandwidth"]["all_reduce_gb_per_second"] > 0
    assert figures["matrix product float32"]["tflops"] > 0
    assert figures["hstu_attention tiled"]["bfloat16_no_bias_tokens_per_second"] > 0


def test_the_report_is_readable(on_cpu: tuple[dict[str, Any], str, str]) -> None:
    document, report, _ = on_cpu
    assert report.startswith("# npu-rec self-test on cpu: passed\n")
    headings = re.findall(r"^## (.*)$", report, re.MULTILINE)
    assert headings == ["Operators", "Training", "Collectives", "Speed", "Environment", "Everything, for programs"]
    for check in document["checks"]:
        assert f"| {check['name']} | {check['status']} |" in report
    found = everything(report)
    assert found["checks"] == document["checks"]
    assert found["machine"]["versions"]["torch"] == torch.__version__
    for secret in (str(Path.home()), socket.gethostname(), str(PACKAGE), sys.prefix):
        assert secret not in report


@needs_fake_npu
def test_passes_on_an_npu(tmp_path: Path) -> None:
    document = npu_rec_on_npu("selftest", "--out", tmp_path / "report.md", strict=True)
    assert (document["device"], document["failed"]) == ("ascend", 0)
    details = {check["name"]: check["detail"] for check in document["checks"] if check["status"] == "passed"}
    assert details["processes start and end"] == "2 processes by hccl"
    assert "pinned to device" in details["host to device and back"]
    assert (
        "# npu-rec self-test on ascend: passed\n\n- device: Ascend910B1, 2 visible"
        in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize("arguments", [["--only", "magic"], ["--out", "no/such/folder.md"], ["--device", "tpu"]])
def test_bad_usage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["npu-rec", "selftest", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_dies_leaves_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def checks(device: object) -> Any:
        yield guarded("training", "first", lambda: ("well", {}))
        raise KeyboardInterrupt

    monkeypatch.setitem(SECTIONS, "training", checks)
    reports: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(CPU, ["training", "speed"], lambda result: reports.append(markdown(result)))
    assert reports[-1].startswith("# npu-rec self-test on cpu: did not end: it was at training\n")
    assert "| first | passed | well |" in reports[-1]


def test_a_section_that_breaks_does_not_stop_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def checks(device: object) -> Any:
        yield guarded("training", "first", lambda: ("well", {}))
        raise MemoryError("card is full")

    monkeypatch.setitem(SECTIONS, "training", checks)
    monkeypatch.setitem(SECTIONS, "speed", lambda device: iter([guarded("speed", "last", lambda: ("well", {}))]))
    result = run(CPU, ["training", "speed"], lambda result: None)
    assert [(check.name, check.status) for check in result.checks] == [
        ("first", "passed"),
        ("the section itself", "failed"),
        ("last", "passed"),
    ]


@pytest.mark.parametrize(("third", "seen"), [(1.005, r"1.0e-02 \(step 3\), more than 0.001"), (float("nan"), "inf")])
def test_other_losses_are_found(tmp_path: Path, third: float, seen: str) -> None:
    for name, losses in (("cpu", [3.0, 2.0, 0.995]), ("device", [3.0, 2.0, third])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"loss": loss, "lr": 1e-3}) for loss in losses]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"loss": 9, "epoch_loss": 9}']) + "\n")
    runs = training._Runs(tmp_path, CPU)
    with pytest.raises(CheckFailed, match=seen):
        runs._compare("device", 0, 3, training.LOSS_LIMIT)
    assert runs._compare("device", 0, 2, training.LOSS_LIMIT)[1]["worst_relative_difference"] == 0
    with pytest.raises(CheckFailed, match="3 losses, 3 on the CPU, expected 4"):
        runs._compare("device", 0, 4, training.LOSS_LIMIT)


def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\necho all_gather\nexec sleep 120\n")
    hanging.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(hanging))
    (check,) = collectives.checks(CPU, timeout=1.0)
    assert check.status == "failed"
    assert check.detail == "ranks [0, 1] of 2 had not ended after 1 s; rank 0 said: all_gather"
    assert check.seconds < 60


def test_processes_that_fail_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    (check,) = collectives.checks(CPU)
    assert (check.status, check.detail) == ("failed", "ranks [0, 1] of 2 failed")


@pytest.mark.parametrize("name", ["broadcast", "all_reduce", "all_gather", "reduce_scatter", "all_to_all_single"])
def test_a_collective_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.distributed, name, lambda *arguments, **options: None)
    with pytest.raises(ValueError, match="expected"):
        getattr(collective_worker.Rank(0, 2, CPU), name)()


def test_what_one_rank_saw_fails_the_check() -> None:
    good: dict[str, object] = {"detail": "well", "figures": {"x": 1.0}, "error": None}
    merged = collectives._merged([{"a": good, "b": good}, {"a": good, "b": {**good, "error": "ValueError: got 3"}}])
    assert merged == {"a": ("well", {"x": 1.0}), "b": "rank 1: ValueError: got 3"}


def test_one_card_has_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "device_report", lambda: {"devices": {"cuda": {"count": 1}}})
    (check,) = collectives.checks(replace(CPU, name="cuda", collective_backend="nccl"))
    assert (check.status, check.detail) == ("skipped", "one card is visible; collectives need two")


def test_scrub() -> None:
    text = f"{Path.home()}/a.py, /data/alice/b/c.py:3 on {socket.gethostname()}, {PACKAGE}/npu_rec/errors.py"
    shown = scrub(f"{text}, /usr/local/Ascend/latest, 3.1 GB/s, forward / backward, file:///home/bob/x")
    assert shown == (
        "~/a.py, <path>/c.py:3 on <host>, <package>/npu_rec/errors.py, "
        "/usr/local/Ascend/latest, 3.1 GB/s, forward / backward, file:<path>/x"
    )


def test_speed_of_a_backend_that_cannot_run_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BackendError("ops.hstu_attention: backend 'tiled' cannot run here: no card")

    monkeypatch.setattr(speed, "compare", refuse)
    checks = {check.name: check for check in speed.checks(CPU)}
    assert (checks["hstu_attention tiled"].status, checks["hstu_attention tiled"].detail) == ("skipped", "no card")


def test_verdict() -> None:
    result = Result("cpu", {}, ["speed"])
    assert result.verdict == "passed"
    result.under_way = "speed"
    assert result.verdict == "did not end: it was at speed"
    result.checks.append(guarded("speed", "x", lambda: ("", {"y": float("inf")})))
    assert result.as_dict()["checks"][0]["figures"] == {"y": None}
