"""The choice between an operator's backends."""

from __future__ import annotations

import logging

import pytest
import torch
from strategies import backends

from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, Backend
from npu_rec.ops.registry import Operator


def works(name: str) -> Backend:
    return Backend(name, forward=lambda request: name, backward=lambda request, grad: ())


def refuses(name: str, reason: str) -> Backend:
    return Backend(name, None, None, supports=lambda request: reason)


def operator_of(*backends: Backend) -> Operator:
    return Operator("test", list(backends), sample=lambda device: None)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_a_reference_that_runs_anywhere(name: str) -> None:
    assert backends(name)[-1] == "reference"  # the slowest last
    assert len(set(backends(name))) == len(backends(name))
    assert OPERATORS[name].availability(torch.device("cpu"))["reference"] is None
    assert hasattr(torch.ops.npu_rec, name)


def test_auto_takes_the_first_that_can_run() -> None:
    operator = operator_of(refuses("triton", "no GPU"), works("tiled"), works("reference"))
    assert operator.select(None, "auto").name == "tiled"


def test_a_forced_backend_is_taken_though_a_faster_one_could_run() -> None:
    assert operator_of(works("tiled"), works("reference")).select(None, "reference").name == "reference"


def test_nothing_that_can_run_raises_with_every_reason() -> None:
    operator = operator_of(refuses("triton", "no GPU"), refuses("cpp", "not built"))
    with pytest.raises(BackendError, match="no backend can run here: triton: no GPU; cpp: not built"):
        operator.select(None, "auto")


def test_availability_gives_each_backends_reason() -> None:
    operator = operator_of(refuses("triton", "no GPU"), works("tiled"))
    assert operator.availability(torch.device("cpu")) == {"triton": "no GPU", "tiled": None}


def test_a_backend_from_outside_goes_before_the_one_named() -> None:
    operator = operator_of(works("tiled"), works("reference"))
    operator.add(works("mine"), before="reference")
    assert [b.name for b in operator.backends] == ["tiled", "mine", "reference"]
    with pytest.raises(BackendError, match="a backend 'mine' is registered already"):
        operator.add(works("mine"), before="tiled")
    with pytest.raises(BackendError, match="no backend 'nowhere'; known: auto, tiled, mine, reference"):
        operator.add(works("other"), before="nowhere")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    operator = Operator("logged", [works("tiled")], sample=lambda device: None)
    with caplog.at_level(logging.INFO, logger="npu_rec"):
        for _ in range(3):
            operator.select(None, "auto")
    assert [record.getMessage() for record in caplog.records] == ["operator logged runs on backend tiled"]
