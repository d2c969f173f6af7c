"""The ranking task: who sees what, heads, features and DIN against loops, and a training that learns a rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import npu_rec
from fake_npu.harness import commands_on_npu, needs_fake_npu
from strategies import generator, normal, one_thread  # noqa: F401
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from train_ranks import Job, column, logged, run_jobs, train_on_ranks, worst

from npu_rec.config import Config, DataConfig, load_config
from npu_rec.data import SequenceStore, prepare
from npu_rec.data.batch import LabelledBatch
from npu_rec.data.features import Codes, Features, Wanted, encode_features
from npu_rec.errors import ConfigError
from npu_rec.models.actions import ActionEncoder
from npu_rec.models.din import DIN
from npu_rec.models.features import SideInformation
from npu_rec.models.heads import Head
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, Ranking, build_task
from npu_rec.train import train
from npu_rec.train.evaluate import evaluate
from npu_rec.train.setup import load_run_config

ITEMS, ACTIONS, USERS = 20, 8, 5
BACKBONES = ("hstu", "llama", "gpt", "sasrec")


def codes(rows: int, size: int, seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 3, rows)
    return Codes(
        torch.from_numpy(rng.integers(1, size + 1, lengths.sum())),
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
        [f"value {i}" for i in range(1, size + 1)],
    )


FEATURES = Features({"genres": codes(ITEMS + 1, 4, 1)}, {"age": codes(USERS, 3, 2), "city": codes(USERS, 6, 3)})


def ranking(backbone: str = "hstu", *, features: Features | None = None, seed: int = 0, **options: Any) -> Ranking:
    """In float64 and evaluation mode, every weight random."""
    dim = 8
    config = Config(
        model={  # type: ignore[arg-type]
            "backbone": backbone, "embedding_dim": dim, "num_blocks": 2, "num_heads": 2, "attention_dim": 4,
            "linear_dim": 4, "max_seq_len": 12, "max_output_len": 4,
        },
        task={"name": "ranking", "options": {"targets": [{"name": "like", "at_least": 4}], **options}},  # type: ignore[arg-type]
        eval={"protocol": "time", "metrics": ["auc"], "select": "auc"},  # type: ignore[arg-type]
    )  # fmt: skip
    facts = DataFacts(ITEMS, range(1, ITEMS + 1), None, True, num_actions=ACTIONS, features=features or Features())
    task = build_task(resolve(config), facts).double().eval()
    assert isinstance(task, Ranking)
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            parameter.copy_(normal(g, *parameter.shape, scale=0.4) + (1.0 if "norm.weight" in name else 0.0))
    return task


def batch_of(histories: list[int], targets: list[int], seed: int = 0) -> LabelledBatch:
    """Rows of one user each; candidates, or where a row has none all of its history, are labelled."""
    g = generator(seed)
    lengths = torch.tensor(histories) + torch.tensor(targets)
    total = int(lengths.sum())
    slot = torch.cat([torch.arange(n) for n in lengths])
    history = torch.repeat_interleave(torch.tensor(histories), lengths)
    target = torch.repeat_interleave(torch.tensor(targets), lengths)
    return LabelledBatch(
        sequence_ids=torch.arange(len(histories)) % USERS,
        offsets=lengths_to_offsets(lengths),
        item_ids=torch.randint(1, ITEMS + 1, (total,), generator=g),
        row_ids=torch.arange(len(histories)) + 100,
        actions=torch.randint(0, ACTIONS, (total,), generator=g),
        labelled=(slot >= history) | (target == 0),
        num_targets=torch.tensor(targets),
        times=torch.cat([torch.randint(0, 10**6, (n,), generator=g).sort().values for n in lengths.tolist()]),
    )


def logits(task: Ranking, batch: LabelledBatch) -> Tensor:
    return task._logits(batch, task.encoder.items(batch.item_ids), batch.labelled, None)


def alone(batch: LabelledBatch, row: int, history: int, place: int) -> LabelledBatch:
    """The row's first `history` events and, as the only candidate, the event at `place`."""
    kept = torch.tensor([*range(history), place]) + batch.offsets[row]
    assert batch.times is not None
    return LabelledBatch(
        batch.sequence_ids[row : row + 1],
        torch.tensor([0, history + 1]),
        batch.item_ids[kept],
        batch.row_ids[row : row + 1],
        batch.actions[kept],
        torch.tensor([False] * history + [True]),
        torch.tensor([1]),
        batch.times[kept],
    )


@pytest.mark.parametrize("features", [Features(), FEATURES], ids=["plain", "features"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_interleaved_training_is_evaluation_at_every_event(backbone: str, features: Features) -> None:
    """What an event of a window gets is what it gets as the only candidate behind the events before it."""
    task = ranking(backbone, features=features)
    batch = batch_of([5, 1, 7], [0, 0, 0])
    together = logits(task, batch)
    rows = [(row, place) for row, n in enumerate([5, 1, 7]) for place in range(n)]
    each = torch.cat([logits(task, alone(batch, row, place, place)) for row, place in rows])
    torch.testing.assert_close(together, each, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backbone", [*BACKBONES, "din"])
def test_candidates_do_not_see_each_other(backbone: str) -> None:
    task = ranking(backbone, layout="merged", features=FEATURES, head="ffn")
    batch = batch_of([5, 0, 7], [3, 2, 4])
    together = logits(task, batch)
    rows = [(row, n, n + k) for row, (n, m) in enumerate([(5, 3), (0, 2), (7, 4)]) for k in range(m)]
    if backbone == "hstu":  # the last event of a history knows the time of the first candidate
        assert batch.times is not None
        for row, n, _ in rows:
            behind = slice(int(batch.offsets[row]) + n, int(batch.offsets[row + 1]))
            batch.times[behind] = batch.times[behind.start]
        together = logits(task, batch)
    each = torch.cat([logits(task, alone(batch, row, n, place)) for row, n, place in rows])
    torch.testing.assert_close(together, each, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("backbone", "layout"),
    [(name, layout) for name in BACKBONES for layout in ("interleaved", "merged")] + [("din", "merged")],
)
@pytest.mark.parametrize("actions", ["value", "bits"])
def test_no_prediction_sees_what_it_predicts(backbone: str, layout: str, actions: str) -> None:
    task = ranking(backbone, layout=layout, actions=actions)
    batch = batch_of([6], [0] if layout == "interleaved" else [2])
    before = logits(task, batch)
    for place in range(batch.tokens):
        changed = batch.actions.clone()
        changed[place] = (changed[place] + 3) % ACTIONS
        after = logits(task, LabelledBatch(**{**vars(batch), "actions": changed}))
        moved = ((after - before).abs().amax(1) > 1e-12).tolist()
        if layout == "interleaved":
            assert moved == [other > place for other in range(6)]  # later events see it, itself and earlier ones not
        else:
            assert moved == [place < 6] * 2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_later_events_change_nothing_earlier(backbone: str) -> None:
    task = ranking(backbone)
    batch = batch_of([6], [0])
    before = logits(task, batch)
    items, times = batch.item_ids.clone(), batch.times.clone()  # type: ignore[union-attr]
    items[4:] = items[4:] % ITEMS + 1
    times[4:] += 10**6
    after = logits(task, LabelledBatch(**{**vars(batch), "item_ids": items, "times": times}))
    assert torch.equal(after[:4], before[:4])
    assert not torch.equal(after[4:], before[4:])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("layout", ["interleaved", "merged"])
def test_contextual_tokens_are_seen_and_see_the_history_where_it_is_whole(
    backbone: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the windows of `interleaved`, where they would tell of what comes later, they see only each other."""
    task = ranking(backbone, features=FEATURES, layout=layout)
    batch, states = batch_of([4], [1]), []
    through = task.encoder.through
    monkeypatch.setattr(task.encoder, "through", lambda *given: states.append(through(*given)) or states[-1])
    before = logits(task, batch)
    other = LabelledBatch(**{**vars(batch), "sequence_ids": batch.sequence_ids + 1})
    assert not torch.allclose(before, logits(task, other))
    items = batch.item_ids.clone()
    items[2] = items[2] % ITEMS + 1
    logits(task, LabelledBatch(**{**vars(batch), "item_ids": items}))
    leading = len(FEATURES.users)
    moved = [not torch.equal(states[0][place], states[2][place]) for place in range(leading)]
    assert moved == [layout == "merged"] * leading


def test_dropout_does_not_depend_on_the_batch() -> None:
    task = ranking("hstu", layout="merged").train()
    batch = batch_of([5, 3], [2, 1])
    together = task._logits(batch, task.encoder.items(batch.item_ids), batch.labelled, 7)
    own = slice(int(batch.offsets[1]), int(batch.offsets[2]))
    second = LabelledBatch(
        batch.sequence_ids[1:], torch.tensor([0, 4]), batch.item_ids[own], batch.row_ids[1:], batch.actions[own],
        batch.labelled[own], batch.num_targets[1:], batch.times[own],  # type: ignore[index]
    )  # fmt: skip
    single = task._logits(second, task.encoder.items(second.item_ids), second.labelled, 7)
    torch.testing.assert_close(together[2:], single, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(single, task._logits(second, task.encoder.items(second.item_ids), second.labelled, 8))


def test_loss_is_the_weighted_sum_of_the_targets() -> None:
    targets = [
        {"name": "like", "at_least": 4},
        {"name": "odd", "bits": 1, "weight": 0.5},
        {"name": "stars", "kind": "regression", "scale": 0.1, "weight": 2.0},
    ]
    task = ranking("hstu", targets=targets)
    batch = batch_of([5, 2], [0, 0])
    got, weights = task.loss(task.prepare(batch, 0))
    out, actions = logits(task, batch), batch.actions
    wanted = binary_cross_entropy_with_logits(out[:, 0], (actions >= 4).double(), reduction="sum")
    wanted = wanted + 0.5 * binary_cross_entropy_with_logits(out[:, 1], (actions % 2).double(), reduction="sum")
    wanted = wanted + 2.0 * (out[:, 2] - 0.1 * actions).square().sum()
    torch.testing.assert_close(got, wanted)
    assert float(weights) == 7.0
    observed = task.observe(batch_of([5, 2], [1, 1]))
    assert observed.shape == (2, 8)
    with torch.no_grad():
        values = task.metrics(task.observe(batch_of([3] * 40, [1] * 40)), ["auc", "logloss", "mse"])
    assert set(values) == {"auc", "logloss", "odd/auc", "odd/logloss", "stars/mse"}


@pytest.mark.parametrize("kind", ["dot", "mlp", "ffn"])
def test_heads(kind: Any) -> None:
    g = generator(3)
    head = Head(kind, 6, [5], 2).double()
    states, items = normal(g, 4, 6).double(), normal(g, 4, 6).double()
    if kind == "dot":
        users = (states @ head.layers.weight.T).view(4, 2, 6)
        wanted = torch.stack([(users[:, t] * items).sum(1) / math.sqrt(6) + head.bias[t] for t in range(2)], 1)
    else:
        first, _, last = head.layers
        x = states * items if kind == "mlp" else torch.cat([states, items], 1)
        x = x @ first.weight.T + first.bias
        if kind == "mlp":
            mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
            x = x * torch.sigmoid((x - mean) / (var + 1e-5).sqrt())
        else:
            x = x.clamp_min(0)
        wanted = x @ last.weight.T + last.bias
    torch.testing.assert_close(head(states, items), wanted)


def test_din_weighs_every_event() -> None:
    model = ranking("din", layout="merged").encoder.backbone
    assert isinstance(model, DIN)
    from npu_rec.models import Layout

    x = normal(generator(1), 9, 8).double()
    layout = Layout(torch.tensor([0, 5, 5, 9]), 16, num_targets=torch.tensor([2, 0, 1]))
    wanted = torch.zeros_like(x)
    first = torch.cat([model.of_event.weight, model.of_candidate.weight, model.of_product.weight], 1)
    for candidate, history in ((3, [0, 1, 2]), (4, [0, 1, 2]), (8, [5, 6, 7])):
        for event in history:
            unit = first @ torch.cat([x[event], x[candidate], x[event] * x[candidate]]) + model.of_candidate.bias
            weight = model.weigh.weight @ torch.where(unit > 0, unit, model.slope * unit) + model.weigh.bias
            wanted[candidate] += weight * x[event]
    torch.testing.assert_close(model(x, layout), wanted)


def test_bits_of_an_action() -> None:
    encoder = ActionEncoder("bits", 8, 5, hides=True).double()
    actions = torch.tensor([0, 1, 6])
    wanted = []
    for action in actions.tolist():
        parts = [encoder.weight[bit] if action >> bit & 1 else torch.zeros(8).double() for bit in range(3)]
        wanted.append(encoder.project(torch.cat(parts)))
    torch.testing.assert_close(encoder(actions), torch.stack(wanted))
    hidden = encoder(actions, torch.tensor([True, False, True]))
    torch.testing.assert_close(hidden[1], encoder.hidden)


@pytest.mark.parametrize("pooling", ["mean", "project"])
def test_side_information(pooling: Any) -> None:
    side = SideInformation(FEATURES.items, pooling, 6).double()
    ids, table = torch.tensor([3, 3, 11, 0]), FEATURES.items["genres"]
    vectors = normal(generator(0), 4, 6)
    weight = side.tables["genres"].weight
    wanted = []
    for row, item in enumerate(ids.tolist()):
        values = table.values[table.offsets[item] : table.offsets[item + 1]]
        feature = weight[values].mean(0) if len(values) else torch.zeros(6).double()
        both = torch.stack([vectors[row], feature])
        wanted.append(both.mean(0) if pooling == "mean" else side.project.weight @ both.flatten())  # type: ignore[union-attr]
    torch.testing.assert_close(side(ids, vectors), torch.stack(wanted))


# --- from files to metrics


def write_films(folder: Path, users: int = 160) -> Path:
    """Every other user likes most films, the others few; even films are liked more."""
    rng = np.random.default_rng(0)
    lines = ["user,item,action,timestamp"]
    for user in range(users):
        for k in range(int(rng.integers(8, 20))):
            item = int(rng.integers(30))
            liked = rng.random() < 0.5 + 0.3 * (-1) ** user + 0.15 * (-1) ** item
            known = rng.random() < 0.8
            lines.append(f"{user},{item},{(2 if liked else 1) if known else 0},{1_000_000_000 + 1000 * k + user}")
    folder.mkdir(parents=True)
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    parities = [f"{i},{'odd' if i % 2 else 'even|any'}\n" for i in range(30)]
    (folder / "items.csv").write_text("".join(["item,parity\n", *parities]))
    (folder / "users.csv").write_text("user,taste\n" + "".join(f"{u},{u % 2}\n" for u in range(users - 1)))
    return folder


FILMS = """
name: films
data:
  name: interactions
  source: {source}
  dir: {prepared}
  options: {{file: events.csv, items_file: items.csv, users_file: users.csv, action: action}}
model: {{embedding_dim: 16, num_blocks: 1, num_heads: 1, attention_dim: 16, linear_dim: 16, max_seq_len: 16}}
task:
  name: ranking
  options: {{targets: [{{name: like, at_least: 2}}], unknown_action: 0, head: ffn}}
train: {{epochs: 8, batch_size: 16, lr: 0.01}}
eval: {{protocol: time, metrics: [auc, gauc, logloss, ne], select: auc}}
device: {{backend: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    config = folder / "films.yaml"
    config.write_text(FILMS.format(source=write_films(folder / "source"), prepared=folder / "prepared"))
    return config


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("task.options.layout=merged", "model.backbone=din", "task.options.actions=bits"),
        ("task.options.layout=merged", "task.options.user_features=[taste]", "task.options.item_features=[parity]"),
        ("model.backbone=llama", "embedding.dim=4", "embedding.optimizer=rowwise_adagrad", "embedding.lr=0.05"),
    ],
    ids=["interleaved", "din", "features", "narrow"],
)
def test_it_learns_who_likes_what(films: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    config = load_run_config(films, list(settings))
    result = train(config, run_dir=tmp_path / "run")
    assert set(result.metrics["test"]) == {"auc", "gauc", "logloss", "ne"}
    assert result.metrics["test"]["auc"] > 0.75
    assert evaluate(config, result.checkpoint).metrics["test"] == result.metrics["test"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("eval.protocol=holdout",), "task.name ranking needs time"),
        (("eval.remove=input",), "eval: remove has no effect: protocol is time"),
        (("eval.metrics=[auc,mse]", "eval.select=mse"), "is not among what eval.metrics gives"),
        (("eval.metrics=[auc,hr@10]",), "no metric is registered as 'hr@10'"),
        (("task.options.targets=[{name: a}]",), "a binary target needs either at_least or bits"),
        (("task.options.item_features=[colour]",), "'colour' is not a feature of the items"),
        (("task.options.layout=merged", "task.options.candidates=50"), "do not fit in the 11 places"),
        (("model.backbone=din",), "task.options.layout merged"),
        (("train.stochastic_length=1.6",), "reads whole histories"),
        (("data.options.action=null",), "needs actions"),
    ],
)
def test_what_cannot_be_is_said(films: Path, tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_run_config(films, list(settings)), run_dir=tmp_path / "run")


RANKED = {
    "interleaved": ("embedding.optimizer=rowwise_adagrad", "embedding.lr=0.05", "task.options.item_features=[parity]"),
    "merged": ("task.options.layout=merged", "task.options.user_features=[taste]", "parallel.dense=fsdp"),
}


def test_two_ranks_train_as_one(films: Path, tmp_path: Path) -> None:
    common = ("train.max_steps=12", "train.log_every=1", "train.checkpoint_every=1000", "parallel.timeout=60")
    jobs = {
        ranks: [Job(str(films), str(tmp_path / str(ranks) / name), (*common, *more)) for name, more in RANKED.items()]
        for ranks in (1, 2)
    }
    run_jobs(jobs[1])
    train_on_ranks(2, jobs[2])
    for name in RANKED:
        one, two = tmp_path / "1" / name, tmp_path / "2" / name
        assert worst(column(two, "loss"), column(one, "loss")) <= 1e-4
        assert logged(two, "test")[-1]["auc"] == pytest.approx(logged(one, "test")[-1]["auc"], abs=0.01)


@needs_fake_npu
def test_an_npu_trains_as_the_cpu(films: Path, tmp_path: Path) -> None:
    """On the stand-in, in strict mode, with the same backends."""
    same = ("hstu_attention=tiled", "norm_gate=reference", "embedding_lookup=reference", "dropout=reference")
    common = ["train.max_steps=6", "train.log_every=1", *(f"ops.{backend}" for backend in same)]
    cases = {
        "merged": [*RANKED["merged"][:2], "task.options.item_features=[parity]", "task.options.head=mlp"],
        "din": ["task.options.layout=merged", "model.backbone=din"],
        "interleaved": ["task.options.actions=bits"],
    }
    for name, more in cases.items():
        train(load_run_config(films, [*common, *more]), run_dir=tmp_path / "cpu" / name)
    commands = {}
    for name, more in cases.items():
        sets = [part for option in (*common, *more, "device.backend=ascend") for part in ("--set", option)]
        commands[name] = ["train", films, *sets, "--run-dir", tmp_path / "npu" / name]
    commands_on_npu(commands, strict=True)
    for name in cases:
        assert worst(column(tmp_path / "npu" / name, "loss"), column(tmp_path / "cpu" / name, "loss")) <= 1e-5


def test_no_recommendations(films: Path, tmp_path: Path) -> None:
    result = train(load_run_config(films, ["train.max_steps=1"]), run_dir=tmp_path / "run")
    done = npu_rec("recommend", "--checkpoint", result.checkpoint, "--history", "1,2")
    assert done.returncode == 2
    assert "task ranking makes no recommendations" in done.stderr
    assert "Traceback" not in done.stderr


def test_features_of_a_data_set(films: Path) -> None:
    store = SequenceStore(prepare(load_config(films).data))
    features = encode_features(store, Wanted(["parity"], ["taste"]))
    parity, taste = features.items["parity"], features.users["taste"]
    assert parity.size == 3  # any, even, odd
    of_raw = dict(zip(store.items["raw_id"].to_pylist(), store.items["item_id"].to_pylist(), strict=True))
    row = of_raw["4"]
    assert parity.values[parity.offsets[row] : parity.offsets[row + 1]].tolist() == [2, 1]
    assert taste.offsets.diff().tolist() == [1] * 159 + [0]  # the last user is not listed


def test_retrieval_refuses_what_is_for_ranking(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="time is for"):
        train(load_run_config(shop, ["eval.protocol=time"]), run_dir=tmp_path / "a")
    with pytest.raises(ConfigError, match="needs candidates behind a history"):
        train(load_run_config(shop, ["model.backbone=din"]), run_dir=tmp_path / "b")


def test_labels_of_movielens(real: Path, tmp_path: Path) -> None:
    """The sample's labels, its times, and how many of its rows are not in the file of events."""
    options = {"labels_file": "ratings_sample_100k.csv"}
    config = DataConfig(name="ml-1m", source=real / "ml-1m", dir=tmp_path, options=options)
    store = SequenceStore(prepare(config, log=lambda line: None))
    assert store.manifest["counts"]["labels"] == 99_943
    assert store.manifest["counts"]["labels_without_event"] == 57
    assert store.num_actions == 11
