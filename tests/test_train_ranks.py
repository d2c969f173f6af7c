"""Training on several ranks is training on one: the same losses, gradient norms, metrics and counts (design 3.6)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from train_ranks import Job, column, logged, run_jobs, train_on_ranks, wide_shop, worst

DATA = os.environ.get("NPU_REC_DATA")
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
USERS = 60

# 60 users in batches of 16: four steps an epoch. Dropout and sampled negatives are on (the defaults).
COMMON = ("train.epochs=3", "eval.every=99", "train.checkpoint_every=1000", "parallel.timeout=60")
LONG = ("train.epochs=13",)

# Rates at which a wrong row, a missing one or a wrong factor shows in the losses at once.
SGD = ("embedding.optimizer=sgd", "embedding.lr=10")
ADAGRAD = ("embedding.optimizer=rowwise_adagrad", "embedding.lr=0.05")
ADAM = ("embedding.optimizer=rowwise_adam", "embedding.lr=0.02")
DYNAMIC = "embedding.kind=dynamic"
POPULAR = "task.options.negatives=popularity"
SMALL = ("train.batch_size=4", "train.max_steps=12")  # batches without some of the 40 items
IN_BATCH = ("task.options.negatives=in_batch", *SMALL)
FEW_DRAWS = ("task.options.num_negatives=1", *SMALL)  # not every item is read in every step
ADMISSION = ("embedding.admission_count=16", "embedding.admission_probability=0.5")
CLIP = "train.clip_norm=0.5"

CASES: dict[str, tuple[str, ...]] = {
    "row-wise, sgd": (*SGD, *IN_BATCH),
    "row-wise, rowwise_adagrad": (*ADAGRAD, *LONG),
    "row-wise, rowwise_adam": (*ADAM, "train.clip=row", CLIP, POPULAR),
    "row-wise, rowwise_adam, few draws": (*ADAM, *FEW_DRAWS),
    "row-wise, dense": (CLIP, *IN_BATCH, "train.weight_decay=0.1"),
    "row-wise, dense, accumulated": ("train.accumulate=2", "train.clip=dense", CLIP, "train.epochs=6"),
    "table-wise, rowwise_adagrad": (*ADAGRAD, "embedding.placement=table_wise", "parallel.balance=order"),
    "table-wise, dense": ("embedding.placement=table_wise",),
    "column-wise, sgd": (*SGD, "embedding.placement=column_wise"),
    "column-wise, rowwise_adagrad": (*ADAGRAD, "embedding.placement=column_wise"),
    # three columns on each of four ranks but the last
    "column-wise, rowwise_adam": (
        *ADAM,
        "embedding.placement=column_wise",
        "train.clip=row",
        CLIP,
        "model.embedding_dim=10",
    ),
    "column-wise, dense": ("embedding.placement=column_wise", CLIP),
    "replicated": ("embedding.placement=replicated", POPULAR),
    "dynamic, rowwise_adagrad": (*ADAGRAD, DYNAMIC, *LONG),
    "dynamic, rowwise_adam": (*ADAM, DYNAMIC, *IN_BATCH),
    "dynamic, rowwise_adam, few draws": (*ADAM, DYNAMIC, *FEW_DRAWS),
    "dynamic, admission": (*ADAGRAD, DYNAMIC, *ADMISSION, *FEW_DRAWS),
    "dynamic, forgetting": (*ADAGRAD, DYNAMIC, "embedding.max_age=1", *FEW_DRAWS),
    "fsdp, rowwise_adagrad": (*ADAGRAD, "parallel.dense=fsdp", "train.recompute=true"),
    "fsdp, dense": ("parallel.dense=fsdp", CLIP),
    "fsdp, accumulated": ("parallel.dense=fsdp", "train.accumulate=2", "train.epochs=6"),
    "fsdp, replicated": ("parallel.dense=fsdp", "embedding.placement=replicated", CLIP),
    "context": (*ADAGRAD, "parallel.context=2", "train.max_steps=12"),
    "context, fsdp, production": (
        "parallel.context=2",
        "parallel.dense=fsdp",
        "model.options.variant=production",
        *IN_BATCH,
    ),
    "token budget": (*ADAGRAD, "train.batch_tokens=60", "train.max_steps=12"),
    "one sequence a step": (*ADAGRAD, "train.batch_size=1", "train.max_steps=12", "parallel.balance=order"),
    "llama, fsdp": ("model.backbone=llama", "parallel.dense=fsdp", "train.recompute=true", CLIP),
    "gpt": ("model.backbone=gpt", *ADAGRAD, *IN_BATCH),
    "sasrec": ("model.backbone=sasrec", "model.options.bias=position_time"),
    "contrast of items": (*ADAGRAD, "task.options.ssl_weight=0.5", "task.options.ssl_items=4", *FEW_DRAWS),
    "production": ("embedding.optimizer=rowwise_adagrad", "model.options.variant=production", "task.options.loss=bce"),
}
ALSO_ON_FOUR = (
    "row-wise, sgd", "row-wise, rowwise_adagrad", "row-wise, rowwise_adam, few draws", "row-wise, dense",
    "context", "dynamic, rowwise_adagrad", "dynamic, admission", "column-wise, rowwise_adam", "fsdp, dense",
)  # fmt: skip
ON_FOUR: dict[str, tuple[str, ...]] = {
    **{name: CASES[name] for name in ALSO_ON_FOUR},
    "replicas, sgd": (*SGD, "embedding.replicas=2", *IN_BATCH),
    "replicas, rowwise_adam, few draws": (*ADAM, "embedding.replicas=2", *FEW_DRAWS),
    "replicas, dense": ("embedding.replicas=2", CLIP),
    "replicas, column-wise, rowwise_adagrad": (*ADAGRAD, "embedding.replicas=2", "embedding.placement=column_wise"),
    "replicas, dynamic, admission": (*CASES["dynamic, admission"], "embedding.replicas=2"),
}
BF16: dict[str, tuple[str, ...]] = {
    "bf16, ddp": (*ADAGRAD, "parallel.reduce=bf16"),
    "bf16, fsdp": (*ADAGRAD, "parallel.reduce=bf16", "parallel.dense=fsdp"),
}
TORCHREC: dict[str, tuple[str, ...]] = {
    "torchrec, row-wise, rowwise_adagrad": (*ADAGRAD, "embedding.engine=torchrec", *LONG),
    "torchrec, table-wise, sgd": (*SGD, "embedding.engine=torchrec", "embedding.placement=table_wise", *IN_BATCH),
}


def run(config: Path, folder: Path, ranks: int, cases: dict[str, tuple[str, ...]]) -> None:
    """Train the cases in `<folder>/<case>`, on one rank in this process."""
    jobs = [Job(str(config), str(folder / name), (*COMMON, *options)) for name, options in cases.items()]
    if ranks == 1:
        run_jobs(jobs)
    else:
        train_on_ranks(ranks, jobs)


def check_equal(found: Path, expected: Path) -> None:
    """The losses and all that is logged with them."""
    losses, references = column(found, "loss"), column(expected, "loss")
    assert len(references) >= 10
    assert worst(losses[:10], references[:10]) <= 1e-5
    assert worst(losses, references) <= 1e-4
    assert worst(column(found, "gradient_norm"), column(expected, "gradient_norm")) <= 1e-4
    counts = ("tokens", *(f"items/{name}" for name in ("rows", "waiting", "evicted", "expired", "refused")))
    for ours, theirs in zip(logged(found), logged(expected), strict=True):
        assert [ours.get(name) for name in counts] == [theirs.get(name) for name in counts]
    for split in ("valid", "test"):
        ours, theirs = logged(found, split)[-1], logged(expected, split)[-1]
        for name in ("hr@1", "hr@10", "ndcg@10", "mrr"):
            assert abs(ours[name] - theirs[name]) <= 1 / USERS, name  # near scores of one user may change places


@pytest.fixture(scope="module")
def one(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    more = {name: tuple(o for o in options if "replicas" not in o) for name, options in ON_FOUR.items()}
    run(shop, folder, 1, CASES | more)
    return folder


@pytest.fixture(scope="module")
def two(shop: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run(shop, folder, 2, CASES | BF16)
    return folder


@pytest.fixture(scope="module")
def four(shop: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run(shop, folder, 4, ON_FOUR)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(two: Path, one: Path, name: str) -> None:
    check_equal(two / name, one / name)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_equal_one(four: Path, one: Path, name: str) -> None:
    check_equal(four / name, one / name)


def test_cases_are_what_their_names_say(one: Path, two: Path) -> None:
    for name in ("row-wise, rowwise_adagrad", "dynamic, rowwise_adagrad"):
        assert len(logged(two / name)) == 52
    first = [column(one / name, "loss")[0] for name in ("row-wise, dense", "replicated", "column-wise, dense")]
    assert len({round(loss, 4) for loss in first}) == 3  # three sources of negatives
    assert max(line["imbalance"] for line in logged(two / "row-wise, sgd")) > 1.0
    last = logged(two / "dynamic, admission")[-1]
    assert last["items/waiting"] > 0
    assert last["items/refused"] > 0
    assert logged(two / "dynamic, forgetting")[-1]["items/expired"] > 0


@pytest.mark.parametrize("name", BF16)
def test_gradients_summed_in_bf16_are_near(two: Path, one: Path, name: str) -> None:
    references = column(one / "row-wise, rowwise_adagrad", "loss")[:12]
    assert 1e-6 < worst(column(two / name, "loss"), references) < 1e-2  # 8 bits of mantissa


@pytest.mark.skipif(find_spec("torchrec") is None, reason="torchrec is not installed (docs/scale.md)")
def test_torchrec_equals_one_rank_of_the_native_engine(shop: Path, tmp_path: Path) -> None:
    native = {name: tuple(o for o in options if "engine" not in o) for name, options in TORCHREC.items()}
    run(shop, tmp_path / "native", 1, native)
    for ranks in (1, 2, 4):
        run(shop, tmp_path / str(ranks), ranks, TORCHREC)
        for name in TORCHREC:
            check_equal(tmp_path / str(ranks) / name, tmp_path / "native" / name)


def tiered(kind: str, tier: str, rows: int) -> tuple[str, ...]:
    return (f"embedding.kind={kind}", f"embedding.tier={tier}", f"embedding.rows={rows}", "embedding.eviction=lru")


def test_rows_in_host_memory_and_on_disk_change_nothing(tmp_path: Path) -> None:
    """A step reads up to about 110 of 400 rows; a rank keeps so many that some of them come and go in every step."""
    common = (*ADAM, *FEW_DRAWS, "train.max_steps=30")
    kinds, shop = ("static", "dynamic"), wide_shop(tmp_path)
    run(shop, tmp_path / "plain", 1, {kind: (*common, f"embedding.kind={kind}") for kind in kinds})
    for ranks, rows in ((1, 140), (2, 80)):
        cases = {f"{k}, {t}": (*common, *tiered(k, t, rows)) for k in kinds for t in ("host", "disk")}
        run(shop, tmp_path / str(ranks), ranks, cases)
        for name in cases:
            found, expected = tmp_path / str(ranks) / name, tmp_path / "plain" / name.partition(",")[0]
            losses, references = column(found, "loss"), column(expected, "loss")
            assert worst(losses[:10], references[:10]) <= 1e-5, name
            assert worst(losses, references) <= 1e-4, name
            last = logged(found)[-1]
            assert 0 < last["items/rows"] <= rows * ranks
            assert min(last[f"items/{what}"] for what in ("evicted", "hits", "bytes_read", "bytes_written")) > 0


@pytest.mark.skipif(DATA is None, reason="NPU_REC_DATA is not set")
def test_movielens_starts_alike_on_two_ranks(tmp_path: Path) -> None:
    """The first losses of configs/quickstart.yaml."""
    data = (f"data.source={Path(str(DATA)) / 'ml-100k'}", f"data.dir={tmp_path / 'prepared'}", "device.threads=1")
    cases = {
        name: (*data, *options, "train.max_steps=10", "train.log_every=1", "eval.select=mrr", "eval.metrics=[mrr]")
        for name, options in {"static": (), "dynamic": (*ADAGRAD, DYNAMIC)}.items()
    }
    for ranks in (1, 2):
        run(QUICKSTART, tmp_path / str(ranks), ranks, cases)
    for name in cases:
        assert worst(column(tmp_path / "2" / name, "loss"), column(tmp_path / "1" / name, "loss")) <= 1e-5
