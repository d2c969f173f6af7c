"""A small study through the command line: points, resume, failures, bit equality."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import npu_rec, npu_rec_json

from npu_rec.config import PACKAGED_CONFIGS, load_config
from npu_rec.errors import ConfigError, DataError, UserError
from npu_rec.scaling import sweep
from npu_rec.scaling.results import finished_rows, read_results, write_row
from npu_rec.scaling.study import EntropySettings, Study, load_study
from npu_rec.scaling.sweep import run_sweep, workers_for
from npu_rec.train.run_dir import RunDirectory

STUDY = """
name: tiny
base: {base}
set: {{train.epochs: 2, train.batch_size: 16}}
grid:
  model.backbone: [hstu, llama]
  size:
    small: {{model.embedding_dim: 8, model.num_heads: 1}}
    large: {{model.embedding_dim: 16, model.num_heads: 2}}
"""


def write_study(folder: Path, shop: Path, text: str = STUDY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text.format(base=shop))
    return path


def only(text: str) -> str:
    """The study with one size and one backbone."""
    return text.replace("[hstu, llama]", "[hstu]").replace("    large:", "#")


def measured(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def test_points_of_a_study(shop: Path, tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, shop))
    names = [f"backbone-{backbone}_size-{size}" for backbone in ("hstu", "llama") for size in ("small", "large")]
    assert [point.name for point in study.points] == names
    last = study.points[-1]
    assert last.settings == {"model.backbone": "llama", "size": "large"}
    assert (last.config.model.backbone, last.config.model.embedding_dim, last.config.device.threads) == ("llama", 16, 1)
    assert len({point.fingerprint for point in study.points}) == 4


@pytest.mark.parametrize("path", sorted((PACKAGED_CONFIGS / "scaling").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_REC_DATA", "data")  # nothing is read
    study = load_study(path)
    assert study.config.name == path.stem
    assert len(study.points) > 1


def test_a_fingerprint_heeds_what_is_measured_alone(shop: Path, tmp_path: Path) -> None:
    def fingerprints(text: str) -> list[str]:
        return [point.fingerprint for point in load_study(write_study(tmp_path, shop, text)).points]

    here = fingerprints(STUDY)
    assert fingerprints(STUDY.replace("train.epochs: 2", "train.epochs: 2, data.dir: elsewhere")) == here
    assert not set(fingerprints(STUDY.replace("train.epochs: 2", "train.epochs: 3"))) & set(here)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: tiny", "nam: tiny", "did you mean `name`"),
        ("train.epochs: 2", "train.epoch: 2", "did you mean `train.epochs`"),
        ("[hstu, llama]", "[hstu, lama]", "lama"),
        ("[hstu, llama]", "[hstu, hstu]", "two points have the name"),
        ("{base}", "nothing.yaml", "tiny.yaml: base: nothing.yaml: no such configuration file"),
        ("[hstu, llama]", "[hstu, din]", "the point model.backbone din, .*din needs candidates behind a history"),
        ("model.embedding_dim: 8,", "model.attention_dim: 7,", "llama.*turn pairs of channels, 7 is odd"),
        ("train.epochs: 2", "eval.protocol: time", "eval.protocol: time is for task.name ranking"),
        ("[hstu, llama]", "[hstu]\n  train.lr: [1e-3, 0.001]", "lr-1e-3.* and .*lr-0.001.* are the same configuration"),
        ("model.num_heads: 2", "model.backbone: gpt", "model.backbone is set by both model.backbone and size"),
        ("[hstu, llama]", "2", r"grid: model.backbone: expected a list .*\(given: 2\)"),
        ("{{model.embedding_dim: 8, model.num_heads: 1}}", "8", r"size: small: expected dotted keys .*\(given: 8\)"),
        ("small:", "1:", "grid: size: a label is text: write '1'"),
        ("small:", f"{'s' * 200}:", "its name would have 2.. letters, at most 200"),
        ("train.epochs: 2", "name: other", "name: points have the names of what the grid chooses"),
        ("train.epochs: 2", "device: {{threads: 2}}", "device.threads: `threads` of the study says"),
        ("name: tiny", "name: tiny\nentropy: {{r: -1}}", "entropy.r"),
        ("name: tiny", "name: tiny\ntargets: [test/books/hr@10]", "targets: 'test/books/hr@10' is not among"),
        ("name: tiny", "name: tiny\ntargets: [test/hr@10, test/hr@10]", "'test/hr@10' stands there twice"),
        ("[hstu, llama]", "[]", "grid: model.backbone has no values"),
        ("name: tiny", "name: tiny\ntargets: [test/ndgc@10]", "targets: 'test/ndgc@10' is not among what the points"),
        ("name: tiny", "name: tiny\ntargets: [train/hr@10]", "targets: 'train/hr@10' is not among .*: .*train/loss"),
        ("train.epochs: 2", "device.threads: 2", "device.threads: `threads` of the study says"),
        ("train.epochs: 2", "train.epochs: two", r"the point .*: `set` or `grid`: train\.epochs: .*\(given: 'two'\)"),
    ],
)
def test_wrong_studies_are_refused(shop: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write_study(tmp_path, shop, STUDY.replace(old, new)))


def test_targets_that_nothing_measures_are_left_out_unless_stated(shop: Path, tmp_path: Path) -> None:
    text = STUDY.replace("train.epochs: 2", "train.epochs: 2, eval.protocol: meta")
    assert load_study(write_study(tmp_path, shop, text)).config.targets == ["test/hr@10", "test/ndcg@10"]
    with pytest.raises(ConfigError, match="targets: 'valid/loss' is not among"):
        load_study(write_study(tmp_path, shop, f"{text}targets: [valid/loss, test/hr@10]\n"))


def test_settings_are_those_of_the_configuration(shop: Path, tmp_path: Path) -> None:
    """YAML takes 1e-3 for text, the configuration for a number; a date, for text."""
    text = STUDY.replace("model.backbone: [hstu, llama]", "train.lr: [1e-3, 3.0e-4, 2]")
    points = load_study(write_study(tmp_path, shop, text)).points
    assert [point.settings["train.lr"] for point in points[::2]] == [0.001, 0.0003, 2.0]
    assert points[0].settings["size"] == "small"
    with pytest.raises(ConfigError, match=r"the point model.backbone 2024-01-01.*no backbone"):
        load_study(write_study(tmp_path, shop, STUDY.replace("[hstu, llama]", "[2024-01-01]")))


def test_a_study_and_a_training_are_told_apart(shop: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, shop)
    with pytest.raises(ConfigError, match=rf"a scaling study .*; `npu-rec sweep {study}` runs it$"):
        load_config(study)
    with pytest.raises(
        ConfigError, match=rf"not a scaling study .*; `npu-rec train {shop}` runs a training configuration$"
    ):
        load_study(shop)


def test_sweep_through_the_command_line(shop: Path, tmp_path: Path) -> None:
    study, out = write_study(tmp_path, shop, STUDY.replace("[hstu, llama]", "[llama]")), tmp_path / "out"
    document = npu_rec_json("sweep", study, "--out", out)
    assert (document["points"], document["finished"], document["failed"]) == (2, 2, [])
    rows = document["rows"]
    assert [row["point"] for row in rows] == [point.name for point in load_study(study).points]
    for row in rows:
        folder = out / row["point"]
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "report.html"} <= {p.name for p in folder.iterdir()}
        assert (row["epochs"], row["steps"], row["threads"], row["tokens_seen"]) == (2, 8, 1, 2 * row["tokens"])
        assert row["flops"] == pytest.approx(3 * row["flops_per_token"] * row["tokens_seen"])
        assert 0 < row["metrics"]["valid"]["loss"] < 20  # cosines over a temperature of 0.05 reach 40
        assert 0 <= row["metrics"]["test"]["hr@10"] <= 1
        assert row["entropy"] > 0
    assert rows[0]["parameters"] < rows[1]["parameters"]
    assert rows[0]["flops_per_token"] < rows[1]["flops_per_token"]
    for name in ("report.html", "table.md", "plots/parameters.png", "plots/parameters.svg"):
        assert (out / name).stat().st_size > 100, name

    assert list(run(study, out).values()) == rows  # nothing is left to do
    assert len((out / "results.jsonl").read_text().splitlines()) == 2

    text = STUDY.replace("[hstu, llama]", "[llama]")
    changed = write_study(tmp_path, shop, text.replace("train.epochs: 2", "train.epochs: 3"))
    refused = npu_rec("sweep", changed, "--out", out, "--report-only")
    assert refused.returncode == 2
    assert "2 rows do not count, their points have another configuration now" in refused.stderr
    assert "no point of the study is finished, as it is configured now; nothing was drawn" in refused.stderr
    assert (out / "table.md").read_text().count("backbone-llama") == 2
    write_study(tmp_path, shop, text)

    (out / "report.html").unlink()
    redrawn = npu_rec_json("sweep", study, "--out", out, "--report-only")
    assert redrawn["rows"] == rows
    page = (out / "report.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert "src='http" not in page


def run(path: Path, out: Path) -> dict[str, dict[str, Any]]:
    study: Study = load_study(path)
    assert run_sweep(study, out) == []
    return {row["point"]: row for row in finished_rows(study, read_results(out / "results.jsonl"))}


@pytest.fixture(scope="module")
def trained(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study of one point, and the row of that."""
    folder = tmp_path_factory.mktemp("trained")
    study = write_study(folder, shop, only(STUDY))
    (row,) = run(study, folder / "out").values()
    return study, row


def test_a_rerun_and_a_resumed_point_have_the_same_bits(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    study, first = trained
    (again,) = run(study, tmp_path).values()
    assert measured(first) == measured(again)

    folder = tmp_path / first["point"]  # as if it had been killed after its first epoch
    (tmp_path / "results.jsonl").unlink()
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-8")
    (resumed,) = run(study, tmp_path).values()
    assert "resumed from step 4" in (folder / "log.txt").read_text()
    assert measured(resumed) == measured(first)


def test_an_interrupted_sweep_ends_its_points_and_goes_on_later(shop: Path, tmp_path: Path) -> None:
    path, out = (
        write_study(tmp_path, shop, only(STUDY).replace("train.epochs: 2", "train.epochs: 40")),
        tmp_path / "out",
    )
    command = [sys.executable, "-m", "npu_rec", "sweep", str(path), "--out", str(out)]
    (point,) = load_study(path).points
    folder = out / point.name
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as sweep:
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        sweep.terminate()
        _, told = sweep.communicate(timeout=60)
    assert sweep.returncode == 143
    assert "ended with 1 points left; the same command goes on with them" in told
    with RunDirectory(folder).lock():  # nobody trains there any more
        assert not (out / "results.jsonl").exists()
    (row,) = run(path, out).values()
    assert row["epochs"] == 40
    assert "resumed from step" in (folder / "log.txt").read_text()


def test_a_point_of_a_changed_study_starts_anew(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Training may go on with other epochs; a point of a study with fewer is another point, and its run is kept."""
    path, first = trained
    shutil.copytree(path.parent / "out", tmp_path / "out")
    study = tmp_path / "tiny.yaml"
    study.write_text(path.read_text().replace("train.epochs: 2", "train.epochs: 1"))
    told: list[str] = []
    assert run_sweep(load_study(study), tmp_path / "out", tell=told.append) == []
    (row,) = finished_rows(load_study(study), read_results(tmp_path / "out" / "results.jsonl"))
    assert (row["epochs"], row["steps"], row["tokens_seen"]) == (1, 4, row["tokens"])
    kept = tmp_path / "out" / f"{first['point']}.{first['fingerprint']}"
    assert any(line.endswith(f"the earlier run is in {kept}") for line in told)
    assert (kept / "checkpoints" / "step-8").is_dir()
    assert run(path, tmp_path / "out")[first["point"]]["epochs"] == 2

    (tmp_path / "out" / first["point"] / "point.json").unlink()
    (tmp_path / "out" / "results.jsonl").unlink()
    (tmp_path / "out" / first["point"] / "result.json").unlink()
    with pytest.raises(UserError, match="holds a run that is no point of a study; choose another"):
        run_sweep(load_study(path), tmp_path / "out")


def test_entropy_of_other_settings_is_left_out(
    trained: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    path, row = trained
    assert row["entropy"] > 0
    study = load_study(path)
    other = dataclasses.replace(study, config=study.config.model_copy(update={"entropy": EntropySettings(m=3)}))
    (left,) = finished_rows(other, {row["point"]: row})
    assert left == {**row, "entropy": None}
    assert "entropy of other settings" in caplog.text


def test_what_stochastic_length_leaves_out_is_not_seen(shop: Path, tmp_path: Path) -> None:
    text = only(STUDY).replace("train.epochs: 2", "train.epochs: 2, train.stochastic_length: 1.05")
    (row,) = run(write_study(tmp_path, shop, text), tmp_path / "out").values()
    assert row["tokens_seen"] < 1.5 * row["tokens"]
    assert row["flops"] == pytest.approx(3 * row["flops_per_token"] * row["tokens_seen"])


def test_rows_alone_are_enough(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    study, first = trained
    write_row(tmp_path / "results.jsonl", first)
    assert list(run(study, tmp_path).values()) == [first]
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_failing_point_stops_no_other(shop: Path, tmp_path: Path) -> None:
    text = STUDY.replace("[hstu, llama]", "[llama]").replace("small: {{", "small: {{data.fraction: 1.0e-9, ")
    study, out, runs = write_study(tmp_path, shop, text), tmp_path / "out", tmp_path / "runs"
    done = npu_rec("sweep", study, "--out", out, "--run-dir", runs, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    (failed,) = document["failed"]
    assert failed["point"] == "backbone-llama_size-small"
    assert "data.fraction: 1e-09 of 60 sequences leaves none" in failed["reason"]
    assert document["finished"] == 1
    page = (out / "report.html").read_text()
    assert "Points that failed" in page
    assert failed["reason"] in page
    assert "1 of 2 points failed" in done.stderr
    assert {path.name for path in runs.iterdir()} == {point.name for point in load_study(study).points}
    assert not {path.name for path in out.iterdir()} & {path.name for path in runs.iterdir()}


def test_a_cut_off_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_row(path, {"point": "a", "status": "failed", "fingerprint": "1"})
    with path.open("a") as file:
        file.write('{"point": "b", "sta')
    assert set(read_results(path)) == {"a"}
    write_row(path, {"point": "c", "status": "failed", "fingerprint": "2"})
    assert set(read_results(path)) == {"a", "c"}
    path.write_text(path.read_text().rstrip())  # a whole row without the end of its line
    write_row(path, {"point": "d", "status": "failed", "fingerprint": "3"})
    assert set(read_results(path)) == {"a", "c", "d"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nonsense", "not a row of results"),
        ("[1]", "not a row of results: it has no 'fingerprint'"),
        ('{"point": "a", "status": "failed"}', "not a row of results: it has no 'fingerprint'"),
        ('{"point": "a", "status": "finished", "fingerprint": "1"}', "not a row of results: it has no 'backbone'"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"point": "x", "status": "failed", "fingerprint": "0"}}\n{row}\n')
    with pytest.raises(DataError, match=rf"results\.jsonl:2: {message}"):
        read_results(path)


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert [workers_for(threads, None) for threads in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert workers_for(2, 3) == 3
    with pytest.raises(UserError, match="8 cores are enough for 4"):
        workers_for(2, 5)
    assert [workers_for(1, None, cards) for cards in (2, 16)] == [2, 8]
    with pytest.raises(UserError, match=r"2 card\(s\) are enough for 2"):
        workers_for(1, 3, 2)


def test_every_point_at_once_has_a_card_of_its_own(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three cards; the points, which train on the CPU, note which one they were given."""
    script = (
        "import os, pathlib, sys, time; time.sleep(0.4);"
        "pathlib.Path(sys.argv[1], 'card').write_text(os.environ['LOCAL_RANK'])"
    )
    real = subprocess.Popen
    monkeypatch.setattr(sweep, "card_count", lambda name: 3)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **keywords: real([*command[:2], script, command[3]], **keywords)
    )
    study = load_study(write_study(tmp_path, shop))
    assert len(run_sweep(study, tmp_path)) == 4  # they leave no result
    cards = [(tmp_path / point.name / "card").read_text() for point in study.points]
    assert sorted(cards[:3]) == ["0", "1", "2"]
    assert cards[3] in cards[:3]
