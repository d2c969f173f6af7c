"""Checkpoints survive kills and refuse damage."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import npu_rec, npu_rec_json

from npu_rec.errors import CheckpointError
from npu_rec.train import checkpoint as ckpt
from npu_rec.train import load_run_config, train
from npu_rec.train.checkpoint import disk
from npu_rec.train.run_dir import RunDirectory

OPTIONS = ("--set", "train.epochs=6", "--set", "train.checkpoint_every=3", "--set", "train.keep_checkpoints=3")


@pytest.fixture(scope="module")
def undisturbed(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert npu_rec("train", shop, *OPTIONS, "--run-dir", folder).returncode == 0
    return folder


def killed_when(shop: Path, folder: Path, condition: Any, slow_save: bool = False) -> None:
    """Start a training process and kill -9 it once `condition()` holds."""
    program = "from npu_rec.cli import main; main()"
    if slow_save:  # holds a save open between its files, so that the kill hits it for certain
        program = (
            "import time; from npu_rec.train.checkpoint import disk; digest = disk.file_digest\n"
            "def slow(*file):\n    time.sleep(0.15)\n    return digest(*file)\n"
            "disk.file_digest = slow\n"
        ) + program
    command = [sys.executable, "-c", program, "train", str(shop), *OPTIONS, "--run-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    step = ckpt.list_steps(folder / "checkpoints")[-1]
    assert step == 24
    checkpoint = ckpt.open_checkpoint(folder / "checkpoints" / f"step-{step}")
    groups = ("model", "optimizer", "random", "facts")
    return {f"{group}.{name}": value for group in groups for name, value in checkpoint.tensors(group).items()}


def assert_resumes_to(shop: Path, folder: Path, undisturbed: Path) -> dict[str, Any]:
    document = npu_rec_json("train", shop, *OPTIONS, "--run-dir", folder, "--resume", "auto")
    ours, theirs = final_tensors(folder), final_tensors(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return document


def test_killed_in_mid_epoch_resumes_bit_for_bit(shop: Path, tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    killed_when(shop, folder, lambda: len(ckpt.list_steps(folder / "checkpoints")) >= 2)
    newest = ckpt.list_steps(folder / "checkpoints")[-1]
    document = assert_resumes_to(shop, folder, undisturbed)
    assert document["resumed_from_step"] == newest > 0
    metrics = (folder / "metrics.jsonl").read_text()
    steps = [line for line in metrics.splitlines() if '"lr"' in line]
    assert len(steps) == 24  # no step is written twice


def test_killed_inside_a_save_resumes_bit_for_bit(shop: Path, tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"

    def saving_the_third() -> bool:
        steps = ckpt.list_steps(folder / "checkpoints")
        return len(steps) >= 2 and any((folder / "checkpoints").glob(".step-*.partial-*/state.json"))

    killed_when(shop, folder, saving_the_third, slow_save=True)
    assert list((folder / "checkpoints").glob(".step-*.partial-*"))
    assert_resumes_to(shop, folder, undisturbed)
    assert not list((folder / "checkpoints").glob(".step-*.partial-*"))


def damaged(undisturbed: Path, tmp_path: Path, name: str, change: Any) -> tuple[Path, Path]:
    source = undisturbed / "checkpoints" / "step-24"
    target = tmp_path / "checkpoints" / "step-24"
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    file = next(p for p in target.iterdir() if p.name.startswith(name))
    change(file)
    return target, file


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("name", ["model-", "model.safetensors.index", "state.json", "config.yaml", "items.arrow"])
@pytest.mark.parametrize("change", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_file_is_refused_by_name(undisturbed: Path, tmp_path: Path, name: str, change: Any) -> None:
    folder, file = damaged(undisturbed, tmp_path, name, change)
    with pytest.raises(CheckpointError, match=file.name):
        ckpt.open_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"format": 99, "files": {}}'])
def test_a_damaged_manifest_is_refused(undisturbed: Path, tmp_path: Path, content: str) -> None:
    folder, _ = damaged(undisturbed, tmp_path, "manifest.json", lambda file: file.write_text(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged|format 99"):
        ckpt.open_checkpoint(folder)


def test_resume_from_damage_is_one_line_and_exit_code_2(shop: Path, undisturbed: Path, tmp_path: Path) -> None:
    _, file = damaged(undisturbed, tmp_path, "model-", flip_a_bit)
    done = npu_rec("train", shop, *OPTIONS, "--run-dir", tmp_path, "--resume", "auto")
    assert done.returncode == 2
    assert file.name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_earlier_checkpoints(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = disk.write_manifest, []

    def fails_the_third_time(*arguments: Any) -> None:
        saves.append(1)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(disk, "write_manifest", fails_the_third_time)
    config = load_run_config(shop, ["train.checkpoint_every=1"])
    with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints are untouched"):
        train(config, run_dir=tmp_path / "run")
    assert ckpt.list_steps(tmp_path / "run" / "checkpoints") == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert train(config, run_dir=tmp_path / "run", resume="auto").resumed_from_step == 2


def test_old_checkpoints_go_and_the_best_stays(shop: Path, tmp_path: Path) -> None:
    config = load_run_config(shop, ["train.epochs=6", "train.lr=1e-2", "train.keep_checkpoints=2"])
    result = train(config, run_dir=tmp_path / "run")
    steps = ckpt.list_steps(tmp_path / "run" / "checkpoints")
    assert len(steps) <= 3
    assert int(result.checkpoint.name.removeprefix("step-")) in steps
    assert steps[-1] == 24


def test_another_map_of_item_ids_is_refused(shop: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The same events in another order number the items anew: weights would be read for other items."""
    source = tmp_path / "source"
    source.mkdir()
    header, *events = (shop.parent / "source" / "events.csv").read_text().splitlines()
    (source / "events.csv").write_text("\n".join([header, *reversed(events)]) + "\n")
    (source / "items.csv").write_text((shop.parent / "source" / "items.csv").read_text())
    other = ["--set", f"data.source={source}", "--set", f"data.dir={tmp_path / 'prepared'}"]
    checkpoint = undisturbed / "checkpoints" / "step-24"
    copy = tmp_path / "run"
    shutil.copytree(undisturbed, copy)
    for command in (
        ("evaluate", shop, "--checkpoint", checkpoint),
        ("train", shop, *OPTIONS, "--run-dir", copy, "--resume", "auto"),
        ("train", shop, "--run-dir", tmp_path / "warm", "--set", f"train.init_from={checkpoint}"),
        ("convert", checkpoint, tmp_path / "converted", "--config", shop),
    ):
        done = npu_rec(*command, *other)
        assert done.returncode == 2
        assert "was trained with other item ids" in done.stderr


def test_one_process_at_a_time(shop: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        done = npu_rec("train", shop, "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "another process" in done.stderr
    assert npu_rec("train", shop, "--run-dir", tmp_path / "run", "--set", "train.epochs=1").returncode == 0
