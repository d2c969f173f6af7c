"""The commands as a person and as a script use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import npu_rec, npu_rec_json

from npu_rec.device import device_report
from npu_rec.models.hstu import build_research_hstu
from npu_rec.models.meta_weights import to_meta_state_dict
from npu_rec.train.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def trained(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return npu_rec_json("train", shop, "--run-dir", folder, "--set", "train.epochs=3")


def test_train_prints_one_document(trained: dict[str, Any]) -> None:
    assert {"run_dir", "checkpoint", "metrics", "seconds", "resumed_from_step"} <= trained.keys()
    assert trained["resumed_from_step"] is None
    assert trained["metrics"]["test"].keys() == {"hr@1", "hr@10", "ndcg@10", "mrr"}


def test_train_shows_a_table_and_where_things_are(shop: Path, tmp_path: Path) -> None:
    done = npu_rec("train", shop, "--run-dir", tmp_path / "run")
    assert done.returncode == 0
    for text in ("hr@10", "report.html", "checkpoints/step-", "run directory"):
        assert text in done.stdout
    assert "epoch 2" in done.stderr


def test_evaluate_repeats_the_test_metrics(shop: Path, trained: dict[str, Any]) -> None:
    document = npu_rec_json("evaluate", shop, "--checkpoint", trained["checkpoint"])
    assert document["metrics"] == trained["metrics"]
    assert {"run_dir", "checkpoint", "metrics", "seconds", "resumed_from_step"} <= document.keys()


def test_recommend_from_the_command_line(trained: dict[str, Any]) -> None:
    history = "sku-3@1600000000,sku-4@1600000500,sku-6@1600009000"
    (answer,) = npu_rec_json(
        "recommend", "--checkpoint", trained["checkpoint"], "--history", history, "--at", 1600010000, "--top-k", 5
    )
    assert len(answer["items"]) == 5
    assert not {"sku-3", "sku-4", "sku-6"} & {item["id"] for item in answer["items"]}
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert all(item["title"] == f"Thing, number {item['id'][4:]}" for item in answer["items"])
    table = npu_rec("recommend", "--checkpoint", trained["checkpoint"], "--history", "sku-3,sku-4")
    assert "Thing, number" in table.stdout
    assert "without times" in table.stderr


def test_recommend_from_files_equals_one_by_one(trained: dict[str, Any], tmp_path: Path) -> None:
    users = tmp_path / "users.tsv"
    users.write_text("anna\tsku-1@5,sku-2@6\t9\nbert\tsku-7,sku-8\n\n" + '{"user": "carl", "history": ["sku-9"]}\n')
    answers = npu_rec_json("recommend", "--checkpoint", trained["checkpoint"], "--users", users, "--top-k", 3)
    assert [answer["user"] for answer in answers] == ["anna", "bert", "carl"]
    (alone,) = npu_rec_json(
        "recommend", "--checkpoint", trained["checkpoint"], "--history", "sku-1@5,sku-2@6", "--at", 9, "--top-k", 3
    )
    assert [i["id"] for i in answers[0]["items"]] == [i["id"] for i in alone["items"]]
    assert [i["score"] for i in answers[0]["items"]] == pytest.approx([i["score"] for i in alone["items"]], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "sku-999"], "'sku-999' is not in the model's catalogue"),
        (["--history", "sku-1@x"], "whole seconds"),
        (["--history", "sku-1@99999999999999999999"], "whole seconds"),
        (["--history", "sku-1", "--at", "5"], "needs the times of the events"),
        (["--history", "sku-1@5,sku-2"], "1 of 2 items have a time"),
        (["--history", "sku-1@5,sku-2@4"], "must not go back"),
        (["--history", "sku-1@5", "--at", "4"], "lies before the last event"),
        (["--history", "sku-1,,sku-2"], "empty item"),
        ([], "either --history or --users"),
        (["--users", "/nowhere.tsv"], "cannot be read"),
    ],
)
def test_recommend_answers_bad_input_in_one_line(trained: dict[str, Any], arguments: list[str], message: str) -> None:
    done = npu_rec("recommend", "--checkpoint", trained["checkpoint"], *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_recommend_names_the_line_of_a_bad_file(trained: dict[str, Any], tmp_path: Path) -> None:
    for content in (
        'a\tsku-1\n{"user": "b", "history": ["sku-1"], "time": [3]}\n',
        "a\tsku-1\nb\n",
        'a\tsku-1\n{"user": "b", "history": 3}\n',
        'a\tsku-1\n{"user": }\n',
    ):
        (tmp_path / "users").write_text(content)
        done = npu_rec("recommend", "--checkpoint", trained["checkpoint"], "--users", tmp_path / "users")
        assert done.returncode == 2
        assert "line 2" in done.stderr


def test_data_list_and_prepare(tmp_path: Path) -> None:
    names = {row["name"] for row in npu_rec_json("data", "list")}
    amazon = {"amazon-books", "amazon-domains", "amazon-games"}
    assert amazon | {"ml-100k", "ml-1m", "ml-20m"} <= names
    assert {"interactions", "kuairand", "otto", "retailrocket", "synthetic"} <= names
    (tmp_path / "events.csv").write_text("user,item,timestamp\na,x,5\na,y,6\nb,x,7\n")
    arguments = ("data", "prepare", "interactions", "--source", tmp_path / "events.csv", "--out", tmp_path / "out")
    document = npu_rec_json(*arguments)
    assert Path(document["path"]).is_dir()
    assert document["manifest"]["counts"]["events"] == 3
    assert npu_rec_json(*arguments)["path"] == document["path"]
    assert "prepared data" in npu_rec(*arguments).stdout


def test_prepare_names_file_row_and_column(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user,item,timestamp\na,x,5\na,y,soon\n")
    done = npu_rec("data", "prepare", "interactions", "--source", tmp_path / "events.csv", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert all(part in done.stderr for part in ("events.csv", "row 3", "timestamp", "'soon'"))


def test_doctor(tmp_path: Path) -> None:
    document = npu_rec_json("doctor")
    assert document["device"]["cpu"]["available"] is True
    assert list(document["operators"]["hstu_attention"]) == [
        "cpp",
        "triton",
        "vendor",
        "triton_ascend",
        "tiled",
        "reference",
    ]
    assert document["operators"]["hstu_attention"]["tiled"] is None
    shown = npu_rec("doctor").stdout
    assert "sampled_softmax_loss" in shown
    assert len(shown.splitlines()) < 60


def test_bench_compares_in_one_run() -> None:
    document = npu_rec_json("bench", "train-step", "--repeats", 1, "--threads", 1)
    rows = {row["backend"]: row for row in document["rows"]}
    assert list(rows) == ["references", "auto", "all events", "stochastic length"]
    assert rows["references"]["speedup"] == 1.0
    assert rows["auto"]["speedup"] > 1.0
    keys = {"name", "backend", "shape", "forward_ms", "backward_ms", "speedup", "peak_extra_bytes", "fraction_of_gemm"}
    assert rows["auto"].keys() == keys | {
        "rows_per_second",
        "forward_tflops",
        "backward_tflops",
        "attention_flops_saved",
        "attention_flops_saved_expected",
    }
    assert "N=4096" in rows["stochastic length"]["shape"]
    assert rows["stochastic length"]["speedup"] > 1.0
    expected = rows["stochastic length"]["attention_flops_saved_expected"]
    assert rows["stochastic length"]["attention_flops_saved"] == pytest.approx(expected, rel=0.05)
    assert 0.5 < expected < 1.0
    assert rows["all events"]["attention_flops_saved"] is None
    done = npu_rec("bench", "attn")
    assert done.returncode == 2
    assert "attention, loss, embedding, norm-gate, train-step, balance" in done.stderr


@pytest.mark.parametrize("backend", ["ascend", "cuda"])
def test_an_absent_device_is_one_line_and_exit_code_2(shop: Path, tmp_path: Path, backend: str) -> None:
    if device_report()["devices"][backend]["available"]:
        pytest.skip(f"this machine has {backend}")
    done = npu_rec("train", shop, "--set", f"device.backend={backend}", "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "install" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_unknown_keys_commands_and_files_exit_with_2(shop: Path, tmp_path: Path) -> None:
    done = npu_rec("train", shop, "--set", "train.epoch=3")
    assert done.returncode == 2
    assert "train.epochs" in done.stderr
    assert npu_rec("trian").returncode == 2
    missing = npu_rec("train", tmp_path / "nowhere.yaml")
    assert missing.returncode == 2
    assert "configs/quickstart.yaml" in missing.stderr
    assert npu_rec("evaluate", shop, "--checkpoint", tmp_path).returncode == 2


def test_convert_meta_and_safetensors_in_and_out(shop: Path, tmp_path: Path) -> None:
    config = ("--config", shop)
    shape = {"embedding_dim": 16, "num_blocks": 2, "num_heads": 2, "attention_dim": 8, "linear_dim": 8}
    model = build_research_hstu(num_items=40, max_sequence_len=16, max_output_len=11, seed=7, **shape)
    meta = {f"module.{name}": value for name, value in to_meta_state_dict(model).items()}
    torch.save({"epoch": 3, "model_state_dict": meta}, tmp_path / "meta.pt")
    written = npu_rec_json("convert", tmp_path / "meta.pt", tmp_path / "checkpoint", *config)
    ours = open_checkpoint(Path(written["target"])).tensors("model")
    assert torch.equal(ours["encoder.items.weight"], model.state_dict()["items.weight"])
    npu_rec_json("convert", tmp_path / "checkpoint", tmp_path / "weights.safetensors", *config)
    npu_rec_json("convert", tmp_path / "weights.safetensors", tmp_path / "back.pt", *config)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[name.removeprefix("module.")], value) for name, value in meta.items())
    (answer,) = npu_rec_json("recommend", "--checkpoint", tmp_path / "checkpoint", "--history", "sku-1@5", "--top-k", 2)
    assert len(answer["items"]) == 2
    warm = ("--set", f"train.init_from={tmp_path / 'weights.safetensors'}", "--set", "train.max_steps=1")
    npu_rec_json("train", shop, *warm, "--run-dir", tmp_path / "warm")


def test_convert_refuses_what_does_not_fit(shop: Path, tmp_path: Path) -> None:
    config = ("--config", shop)
    torch.save({"strange": torch.zeros(2)}, tmp_path / "strange.pt")
    done = npu_rec("convert", tmp_path / "strange.pt", tmp_path / "out", *config)
    assert done.returncode == 2
    assert "missing _embedding_module._item_emb.weight" in done.stderr
    (tmp_path / "text.pt").write_text("no checkpoint")
    done = npu_rec("convert", tmp_path / "text.pt", tmp_path / "out", *config)
    assert done.returncode == 2
    assert "text.pt" in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    assert "exists already" in npu_rec("convert", tmp_path / "text.pt", tmp_path / "there", *config).stderr


def test_json_keeps_stdout_clean(shop: Path, tmp_path: Path) -> None:
    done = npu_rec("train", shop, "--run-dir", tmp_path / "run", "--json")
    assert json.loads(done.stdout)["metrics"]
    assert "epoch 1" in done.stderr
