"""Laws, plots and report from rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npu_rec.scaling.analysis import laws, quantity, surfaces
from npu_rec.scaling.groups import curves, families, numeric_settings
from npu_rec.scaling.report import write_report
from npu_rec.scaling.study import Study, load_study

pytest.importorskip("scipy", reason="scipy is not installed (pip install -e '.[test]')")

TARGETS = ["valid/loss", "test/ndcg@10"]


def planted_rows(backbones: tuple[str, ...] = ("hstu", "llama"), seed: int = 0) -> list[dict[str, Any]]:
    """8 sizes on 3 amounts of data; the loss is 2 + 40 / N^0.3 + 60 / D^0.4 with 1 % noise."""
    rng, rows = np.random.default_rng(seed), []
    for backbone in backbones:
        for blocks in (1, 2, 4, 8):
            for width in (32, 128):
                for tokens in (20_000, 60_000, 200_000):
                    parameters = 12 * blocks * width**2
                    loss = (2 + 40 / parameters**0.3 + 60 / tokens**0.4) * np.exp(0.01 * rng.normal())
                    ndcg = 1 - (0.5 + 2 / parameters**0.2 + 3 / tokens**0.3) * np.exp(0.002 * rng.normal())
                    row = {"point": f"{backbone}_{blocks}_{width}_{tokens}", "status": "finished"}
                    row["settings"] = {"model.backbone": backbone, "size": f"{blocks}x{width}", "data.fraction": tokens}
                    row |= {"backbone": backbone, "blocks": blocks, "width": width, "parameters": parameters}
                    row |= {"tokens": tokens, "tokens_seen": 8 * tokens, "flops_per_token": 2.0 * parameters}
                    row |= {"flops": 48.0 * parameters * tokens, "epochs": 8, "best_epoch": 7, "seconds": 1.0}
                    row |= {"entropy": 0.02, "metrics": {"valid": {"loss": loss}, "test": {"ndcg@10": ndcg}}}
                    rows.append(row)
    return rows


@pytest.fixture
def study(shop: Path, tmp_path: Path) -> Study:
    path = tmp_path / "planted.yaml"
    path.write_text(f"name: planted\nbase: {shop}\ngrid: {{train.seed: [1]}}\ntargets: [{', '.join(TARGETS)}]\n")
    return load_study(path)


def test_laws_of_planted_rows() -> None:
    found = {(law.family, law.target, law.kind): law for law in laws(planted_rows(("hstu",)), TARGETS)}
    assert {kind for _, target, kind in found if target == "valid/loss"} == {
        "joint", "parameters", "compute", "data",
    }  # fmt: skip
    data = found["hstu", "valid/loss", "data"].fit
    assert (data.points, data.form.floor) == (3, False)  # too few for an E
    joint = found["hstu", "valid/loss", "joint"]
    for name, exponent in (("exponent:parameters", 0.3), ("exponent:data", 0.4)):
        low, high = joint.fit.interval(name)
        assert low < exponent < high
    assert joint.held_out is not None
    assert joint.held_out.point == "hstu_8_128_200000"
    assert joint.held_out.predicted == pytest.approx(joint.held_out.measured, rel=0.05)
    assert found["hstu", "valid/loss", "parameters"].fit.points == 8  # those with the most data


def test_of_a_metric_the_distance_from_one_is_fitted() -> None:
    rows = planted_rows(("hstu",))
    ndcg = [row["metrics"]["test"]["ndcg@10"] for row in rows]
    assert quantity("test/ndcg@10", rows) == pytest.approx(1 - np.array(ndcg))
    assert quantity("valid/loss", rows) == pytest.approx([row["metrics"]["valid"]["loss"] for row in rows])


def test_what_should_fall_is_fitted_as_it_is() -> None:
    rows = planted_rows(("hstu",))
    for row in rows:
        row["metrics"]["test"] = {"logloss": row["metrics"]["valid"]["loss"] / 10}
    assert quantity("test/logloss", rows) == pytest.approx([row["metrics"]["test"]["logloss"] for row in rows])
    joint = laws(rows, ["test/logloss"])[0]
    assert joint.kind == "joint"
    assert joint.fit.values["exponent:parameters"] == pytest.approx(0.3, rel=0.3)


def test_seeds_are_no_sizes() -> None:
    """Three seeds, whose shares of the data and early ends differ a little, make no law that one would not."""
    rows = []
    for row in planted_rows(("hstu",)):
        for seed in (1, 2, 3):
            own = row | {"point": f"{row['point']}_{seed}", "tokens": row["tokens"] + seed, "flops": row["flops"]}
            rows.append(own | {"settings": row["settings"] | {"train.seed": seed}})
    found = {law.kind: law for law in laws(rows, ["valid/loss"])}
    assert (found["data"].fit.points, found["data"].fit.form.floor) == (9, False)  # three amounts are too few for an E
    held_out = found["joint"].held_out
    assert held_out is not None
    assert held_out.measured == pytest.approx(rows[-1]["metrics"]["valid"]["loss"])
    left = [row for row in rows if row["settings"]["size"] in ("1x32", "8x128")]
    assert {law.kind for law in laws(left, ["valid/loss"])} == {"data"}  # two sizes, in 18 points


def test_what_is_no_size_makes_families() -> None:
    """Points of another learning rate follow a law of their own; the largest is left out with all its seeds."""
    rows = []
    for row in planted_rows(("hstu", "llama")):
        for lr in (0.001, 0.01):
            own = row | {"point": f"{row['point']}_{lr}", "settings": row["settings"] | {"train.lr": lr}}
            loss = row["metrics"]["valid"]["loss"] * (1 if lr == 0.001 else 3)
            rows.append(own | {"metrics": {"valid": {"loss": loss}}})
    assert list(families(rows)) == ["hstu, lr 0.001", "hstu, lr 0.01", "llama, lr 0.001", "llama, lr 0.01"]
    found = {law.family: law for law in laws(rows, ["valid/loss"]) if law.kind == "joint"}
    assert [law.fit.points for law in found.values()] == [24] * 4
    assert list(families(planted_rows())) == ["hstu", "llama"]


def test_performance_law_is_fitted_with_both_signs() -> None:
    found = surfaces(planted_rows(("hstu",)), TARGETS)
    assert [(one.target, one.law.sign) for one in found] == [("test/ndcg@10", "divide"), ("test/ndcg@10", "multiply")]
    assert min(one.law.r_squared for one in found) > 0.8  # rows of another law


def test_report_stands_alone(study: Study, tmp_path: Path) -> None:
    write_report(study, planted_rows(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "http" not in page
    for variable in ("parameters", "compute", "data"):
        assert (tmp_path / "plots" / f"{variable}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "plots" / f"{variable}.svg").read_text()
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + 48
    documents = json.loads((tmp_path / "fits.json").read_text())
    assert {law["kind"] for law in documents["laws"]} == {"joint", "parameters", "compute", "data"}
    assert {law["family"] for law in documents["laws"]} == {"hstu", "llama"}
    assert {(law["target"], law["quantity"]) for law in documents["laws"]} == {
        ("valid/loss", "valid/loss"), ("test/ndcg@10", "1 - test/ndcg@10"),
    }  # fmt: skip


def test_the_same_rows_draw_the_same_plots(study: Study, tmp_path: Path) -> None:
    rows = planted_rows(("hstu",))[::3]  # the least data alone
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_report(study, rows, folder)
    for name in ("report.html", "plots/parameters.svg", "fits.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_few_points_make_a_report_without_laws(study: Study, tmp_path: Path) -> None:
    write_report(study, planted_rows()[:1], tmp_path)
    assert "Too few points" in (tmp_path / "report.html").read_text()
    assert write_report(study, [], tmp_path).laws == []


def seeded_rows(seeds: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """Two backbones of 1 to 8 blocks on one amount of data; NDCG is blocks / 100 + seed / 1000."""
    rows = []
    for row in planted_rows():
        if row["tokens"] == 20_000 and row["width"] == 32:
            for seed in seeds:
                own = row | {"point": f"{row['point']}_{seed}"}
                own["settings"] = {
                    "model.backbone": row["backbone"], "model.num_blocks": row["blocks"], "train.seed": seed,
                }  # fmt: skip
                own["metrics"] = {"test": {"ndcg@10": row["blocks"] / 100 + seed / 1000}}
                rows.append(own)
    return rows


def test_means_over_the_seeds(study: Study, tmp_path: Path) -> None:
    write_report(study, seeded_rows(), tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| setting | seeds | test/ndcg@10 |" in lines
    assert "| llama, num_blocks 4 | 2 | 0.0415 ± 0.0007 |" in lines
    assert len(lines) == 2 + 16 + 1 + 2 + 8
    assert "0.0415 ± 0.0007" in (tmp_path / "report.html").read_text()


def test_what_the_grid_varies_is_drawn(study: Study, tmp_path: Path) -> None:
    rows = seeded_rows()
    write_report(study, rows, tmp_path)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        "num_blocks", "settings", "parameters", "compute",
    }  # fmt: skip
    assert list(curves(rows, "model.num_blocks")) == ["hstu", "llama"]
    four = curves(rows[::-1], "model.num_blocks")["llama"][2]
    assert four.settings["model.num_blocks"] == 4
    assert four.values("test/ndcg@10") == pytest.approx([0.042, 0.041])
    assert numeric_settings(rows) == ["model.num_blocks"]


def test_variants_of_one_size_make_no_law() -> None:
    rows = seeded_rows((1,))
    assert {law.kind for law in laws(rows, ["test/ndcg@10"])} == {"parameters", "compute"}
    for i, row in enumerate(rows):
        row["parameters"] = 10_000 + 100 * i
    assert laws(rows, ["test/ndcg@10"]) == []
