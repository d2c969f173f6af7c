"""What `npu-rec doctor` says of Ascend's operators: a missing package, another schema, a call out of limits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import vendor_standins as attention
import vendor_standins_npu as npu
import vendor_standins_small as small
from typer.testing import CliRunner
from vendor_standins import StandIn, registered

from npu_rec.cli import app
from npu_rec.ops import OPERATORS

NAMES = [name for name, operator in OPERATORS.items() if any(b.name == "vendor" for b in operator.backends)]
EVERYTHING: list[StandIn] = [
    *attention.HSTU_JAGGED,
    *attention.HSTU_V2,
    *attention.HSTU_DENSE,
    *small.NORM_MULTIPLY_DROPOUT,
    *small.LN_MUL,
    *small.ROW_UPDATES,
    *small.LINEAR_SILU,
    *npu.FUSION_ATTENTION,
    *npu.RMS_NORM,
    *npu.ROTARY,
    *npu.SWIGLU,
]
NARROWED = {  # schema as it is -> as another release has it
    "float silu_scale=0.0": "float scale=0.0",
    "float eps, float dropout_ratio": "float epsilon, float dropout_ratio",
    "Tensor indices, Tensor offsets": "Tensor indices, int[] offsets",
    "int[] attr_dict": "int[] split_list",
    "int sparse_mode=0": "int mode=0",
    "Tensor gamma": "Tensor weight",
    "Tensor r1": "Tensor cos",
    "int dim=-1": "int axis=-1",
}


def doctor() -> dict[str, str | None]:
    """operator -> what is said of its vendor backend."""
    run = CliRunner().invoke(app, ["doctor", "--json"])
    assert run.exit_code == 0, run.output
    operators = json.loads(run.stdout)["operators"]
    return {name: operators[name]["vendor"] for name in NAMES}


def test_the_operators_with_an_adapter() -> None:
    assert NAMES == [
        "embedding_lookup", "hstu_attention", "linear_silu", "norm_gate", "rms_norm", "rotary", "softmax_attention",
        "swiglu",
    ]  # fmt: skip


def test_a_missing_package() -> None:
    packages = {"embedding_lookup": "fbgemm_ascend", "hstu_attention": "rec_ops", "linear_silu": "rec_ops"}
    for name, reason in doctor().items():
        assert reason is not None
        package = packages.get(name, "rec_ops" if name == "norm_gate" else "torch_npu")
        assert reason.startswith("no ")
        assert f": {package} is for Ascend NPUs" in reason, name


def test_another_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = []
    for schema, function in EVERYTHING:
        for old, new in NARROWED.items():
            schema = schema.replace(old, new)
        changed.append((schema, function))
    simple: dict[str, dict[str, Any]] = {  # samples that get past dropout and bias
        "norm_gate": {"dropout": 0.0},
        "hstu_attention": dict.fromkeys(("position_weight", "time_weight", "query_time", "key_time")),
    }
    for name, fields in simple.items():
        request = dataclasses.replace(OPERATORS[name].sample(torch.device("cpu")), **fields)
        monkeypatch.setattr(OPERATORS[name], "sample", lambda device, request=request: request)
    with registered(*changed):
        for name, reason in doctor().items():
            assert reason is not None
            assert "another release of" in reason, name


def test_a_call_out_of_limits_and_calls_within() -> None:
    with registered(*EVERYTHING):
        assert doctor() == {
            "embedding_lookup": None,
            "hstu_attention": "takes a bias only as a dense [B, H, N, N] tensor",
            "linear_silu": "computes in float16 and bfloat16, not in torch.float32",
            "norm_gate": "its dropout is not drawn from keys",
            "rms_norm": None,
            "rotary": None,
            "softmax_attention": None,
            "swiglu": None,
        }
