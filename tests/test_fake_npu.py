"""The fake npu itself (tests/fake_npu), the device layer and the collectives on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_npu.fake_npu_build import VERSION
from fake_npu.harness import FOLDER, needs_fake_npu, npu_rec_on_npu, on_npu, processes_on_npu

pytestmark = needs_fake_npu


def test_device_layer() -> None:
    """Selection, exact memory statistics, generators, streams, events, pinned memory, autocast, dispatch."""
    on_npu("device_layer.py")


def test_strict_mode_refuses_what_ascend_lacks() -> None:
    on_npu("strict_refusals.py", strict=True)


def test_collectives_ddp_fsdp_and_dtensor(tmp_path: Path) -> None:
    """Between two devices: collectives under their old and new names, uneven splits, training against one process."""
    processes_on_npu("distributed.py", 2, tmp_path, strict=True)


def test_doctor() -> None:
    report = npu_rec_on_npu(
        "doctor", FAKE_NPU_CHIP="Ascend950PR_9589", FAKE_NPU_DEVICES="3", FAKE_NPU_MEMORY=str(2**30)
    )
    assert report["selected"] == "ascend"
    ascend = report["device"]["ascend"]
    assert (ascend["name"], ascend["count"], ascend["memory_bytes"]) == ("Ascend950PR_9589", 3, 2**30)
    assert (ascend["profile"]["cube_cores"], ascend["profile"]["ub_bytes"]) == (32, 248 * 1024)
    assert report["versions"]["torch_npu"] == VERSION
    attention = report["operators"]["hstu_attention"]
    assert attention["cpp"] == "the tensors are on npu"
    for operator, plain in (
        ("hstu_attention", "tiled"),
        ("sampled_softmax_loss", "chunked"),
        ("norm_gate", "reference"),
    ):
        assert report["operators"][operator][plain] is None


def entries(name: str) -> list[str]:
    return [line for line in (FOLDER / "operators" / name).read_text().splitlines() if not line.startswith("#")]


def test_lists_of_operators() -> None:
    reviewed = [line.split()[0] for line in entries("reviewed.txt") if line.strip()]
    assert reviewed == sorted(set(reviewed))
    known = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert not [name for name in reviewed if name not in known and f"{name}_" not in known]
    assert "embedding_bag" not in " ".join(reviewed)
    assert not [name for name in reviewed if "::" in name or "nested" in name or "jagged" in name]
    assert any("silu" in line for line in entries("unsupported.yaml"))


@pytest.mark.parametrize("name", ["reviewed.txt", "unsupported.yaml"])
def test_lists_say_how_to_change_them(name: str) -> None:
    assert (FOLDER / "operators" / name).read_text().startswith("#")
