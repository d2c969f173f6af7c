"""A run saved by two ranks goes on with one, two or four as if nothing had happened (design 3.8)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_ranks import Job, column, logged, run_jobs, train_on_ranks, wide_shop, worst

from npu_rec.train.checkpoint import open_checkpoint

STOP, STEPS = 6, 26  # four steps an epoch: it stops in the middle of the second one, and does 20 more
COMMON = (f"train.max_steps={STEPS}", "train.epochs=99", "eval.every=99", "train.checkpoint_every=1000")

ADAGRAD = ("embedding.optimizer=rowwise_adagrad", "embedding.lr=0.05")
ADAM = ("embedding.optimizer=rowwise_adam", "embedding.lr=0.02")
DYNAMIC = "embedding.kind=dynamic"
FEW_DRAWS = ("task.options.num_negatives=1", "train.batch_size=4")

CASES: dict[str, tuple[str, ...]] = {
    "static, rowwise_adam": ADAM,
    "static, dense": ("train.clip_norm=0.5",),
    "column-wise, rowwise_adagrad": (*ADAGRAD, "embedding.placement=column_wise"),
    "fsdp": ("parallel.dense=fsdp", "train.accumulate=2"),
    "dynamic, rowwise_adagrad": (*ADAGRAD, DYNAMIC),
    # ids that wait and ids that age are part of what is saved
    "dynamic, admission": (
        *ADAM, DYNAMIC, *FEW_DRAWS,
        "embedding.admission_count=10", "embedding.admission_probability=0.5", "embedding.max_age=3",
    ),
    "dynamic, disk": (
        *ADAM, DYNAMIC, *FEW_DRAWS, "embedding.tier=disk", "embedding.rows=80", "embedding.eviction=lru",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`undisturbed/<case>`, all by two ranks; `<n>/<case>`, by two ranks to step 6 and then by n."""
    folder = tmp_path_factory.mktemp("runs")
    configs = dict.fromkeys(CASES, shop) | {"dynamic, disk": wide_shop(folder)}

    def jobs(name: str, *more: str, resume: str | None = None) -> list[Job]:
        return [
            Job(str(configs[case]), str(folder / name / case), (*COMMON, *options, *more), resume)
            for case, options in CASES.items()
        ]

    train_on_ranks(2, [*jobs("undisturbed"), *jobs("2", f"train.max_steps={STOP}")])
    for ranks in ("1", "4"):
        shutil.copytree(folder / "2", folder / ranks, ignore=shutil.ignore_patterns("tables"))  # huge once copied
    of_disk = jobs("1", "embedding.rows=160", resume="auto")[-1]  # one rank needs the rows of a step of both
    run_jobs([*jobs("1", resume="auto")[:-1], of_disk])
    train_on_ranks(2, jobs("2", resume="auto"))
    train_on_ranks(4, jobs("4", resume="auto"))
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_next_losses_equal_those_of_an_undisturbed_run(runs: Path, ranks: int, name: str) -> None:
    found, expected = runs / str(ranks) / name, runs / "undisturbed" / name
    steps = [line["step"] for line in logged(found)]
    assert steps == list(range(1, STEPS + 1))  # no batch twice, none lost
    assert worst(column(found, "loss"), column(expected, "loss")) <= 1e-5
    assert worst(column(found, "gradient_norm"), column(expected, "gradient_norm")) <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_same_ranks_go_on_bit_for_bit(runs: Path, name: str) -> None:
    found, expected = runs / "2" / name, runs / "undisturbed" / name
    for what in ("loss", "gradient_norm"):
        assert column(found, what) == column(expected, what)
    ours, theirs = everything(found), everything(expected)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def everything(run: Path) -> dict[str, Tensor]:
    """Weights, optimiser state and rows by id of the last checkpoint; rows in the order of their ids."""
    checkpoint = open_checkpoint(run / "checkpoints" / f"step-{STEPS}")
    values = {f"{group}.{k}": x for group in ("model", "optimizer") for k, x in checkpoint.tensors(group).items()}
    for name in checkpoint.keyed_names:
        pieces = list(checkpoint.keyed(name))
        if not pieces:  # nothing waits
            values[name] = torch.empty(0, dtype=torch.int64)
            continue
        keys = torch.cat([piece.keys for piece in pieces])
        order = torch.argsort(keys)
        values[name] = keys[order]
        for column_name in pieces[0].columns:
            values[f"{name}/{column_name}"] = torch.cat([piece.columns[column_name] for piece in pieces])[order]
    return values


def test_what_is_saved_is_not_trivial(runs: Path) -> None:
    saved = everything(runs / "2" / "dynamic, admission")
    assert len(saved["model.encoder.items"]) > 0
    assert float(saved["model.encoder.items/momentum"].abs().max()) > 0
    at_stop = logged(runs / "2" / "dynamic, admission")[STOP - 1]
    assert min(at_stop["items/rows"], at_stop["items/waiting"], at_stop["items/refused"]) > 0
    assert logged(runs / "2" / "dynamic, disk")[STOP - 1]["items/evicted"] > 0
    for name in ("static, rowwise_adam", "static, dense", "dynamic, rowwise_adagrad"):
        losses = column(runs / "undisturbed" / name, "loss")
        assert losses[-1] < 0.8 * losses[0]
