"""Training on one and two fake npus, rows and gradients over "hccl": the losses of one process on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_npu.harness import needs_fake_npu, processes_on_npu
from train_ranks import Job, column, logged, meeting_place, run_jobs, worst, write_jobs

pytestmark = needs_fake_npu

# Backends that the npu has too, in strict mode; as in test_fake_npu_train.py.
COMMON = (
    "ops.hstu_attention=tiled", "ops.sampled_softmax_loss=chunked", "ops.norm_gate=reference",
    "ops.embedding_lookup=reference", "train.epochs=3", "eval.every=99", "train.checkpoint_every=1000",
    "parallel.timeout=60",
)  # fmt: skip
ADAGRAD = ("embedding.optimizer=rowwise_adagrad", "embedding.lr=0.05")
ADAM = ("embedding.optimizer=rowwise_adam", "embedding.lr=0.02")
DYNAMIC = "embedding.kind=dynamic"
FEW_DRAWS = ("task.options.num_negatives=1", "train.batch_size=4", "train.max_steps=12")

CASES: dict[str, tuple[str, ...]] = {
    "static, rowwise_adagrad": ADAGRAD,
    "static, rowwise_adam": (*ADAM, "task.options.negatives=in_batch", *FEW_DRAWS),
    "static, dense": ("train.clip_norm=0.5",),
    "column-wise, rowwise_adagrad": (*ADAGRAD, "embedding.placement=column_wise"),
    "fsdp": (*ADAGRAD, "parallel.dense=fsdp"),
    "dynamic, rowwise_adagrad": (*ADAGRAD, DYNAMIC),
    "dynamic, admission": (
        *ADAM, DYNAMIC, *FEW_DRAWS, "embedding.admission_count=4", "embedding.admission_probability=0.5",
    ),
    "dynamic, host": (
        *ADAM, DYNAMIC, *FEW_DRAWS, "embedding.tier=host", "embedding.rows=40", "embedding.eviction=lru",
    ),
}  # fmt: skip


def jobs(config: Path, folder: Path, backend: str) -> list[Job]:
    device = f"device.backend={backend}"
    return [Job(str(config), str(folder / name), (*COMMON, *options, device)) for name, options in CASES.items()]


@pytest.fixture(scope="module")
def cpu(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    run_jobs(jobs(shop, folder, "cpu"))
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def npus(shop: Path, cpu: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("npus")
    write_jobs(folder, jobs(shop, folder, "ascend"))
    with meeting_place() as place, pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        processes_on_npu("train_ranks.py", request.param, folder, strict=True)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_those_of_the_cpu(npus: Path, cpu: Path, name: str) -> None:
    losses, references = column(npus / name, "loss"), column(cpu / name, "loss")
    assert len(references) == 12
    assert worst(losses[:10], references[:10]) <= 1e-5
    assert worst(losses, references) <= 1e-4
    assert worst(column(npus / name, "gradient_norm"), column(cpu / name, "gradient_norm")) <= 1e-4
    ours, theirs = logged(npus / name, "test")[-1], logged(cpu / name, "test")[-1]
    assert ours["hr@10"] == pytest.approx(theirs["hr@10"], abs=1 / 60)  # near scores of one user may change places
