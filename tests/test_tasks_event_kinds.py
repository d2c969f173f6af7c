"""Retrieval with several behaviours and domains."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from strategies import generator, normal, one_thread  # noqa: F401
from torch import Tensor
from train_ranks import Job, column, run_jobs, train_on_ranks

from npu_rec.config import Config
from npu_rec.data import Events
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.features import Codes, Features, _codes
from npu_rec.data.splits import LeaveOneOut, leave_one_out
from npu_rec.errors import ConfigError
from npu_rec.models import Layout
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, Retrieval, build_task
from npu_rec.train import train
from npu_rec.train.setup import load_run_config

ITEMS, ACTIONS = 12, 3
DOMAINS = Codes(torch.tensor([1, 2] * 6), torch.tensor([0, *range(13)]), ["books", "games"])
READINGS = [("behaviours", "added"), ("behaviours", "tokens"), ("domains", "added"), ("domains", "tokens")]


def retrieval(backbone: str = "hstu", **options: Any) -> Retrieval:
    config = Config(
        model={  # type: ignore[arg-type]
            "backbone": backbone, "embedding_dim": 8, "num_blocks": 2, "num_heads": 1, "attention_dim": 8,
            "linear_dim": 8, "max_seq_len": 10, "max_output_len": 1,
        },
        task={"name": "retrieval", "options": {"num_negatives": 4, **options}},  # type: ignore[arg-type]
    )  # fmt: skip
    features = Features({"domain": DOMAINS})
    facts = DataFacts(ITEMS, range(1, ITEMS + 1), None, True, num_actions=ACTIONS, features=features)
    task = build_task(resolve(config), facts).double()
    assert isinstance(task, Retrieval)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.copy_(normal(generator(parameter.numel()), *parameter.shape, scale=0.4))
    return task


def batch_of(lengths: list[int], seed: int = 0) -> JaggedBatch:
    g, total = generator(seed), sum(lengths)
    times = torch.randint(0, 10**5, (total,), generator=g).sort().values
    items, after = torch.randint(1, ITEMS + 1, (2, total), generator=g)
    actions, later = torch.randint(0, ACTIONS, (2, total), generator=g)
    offsets = lengths_to_offsets(torch.tensor(lengths))
    return JaggedBatch(torch.arange(len(lengths)), offsets, items, after, times, times + 9, actions, later)


def options_of(name: str, reading: str) -> dict[str, Any]:
    return {name: reading} | ({"domain_feature": "domain"} if name == "domains" else {})


def hidden(task: Retrieval, batch: JaggedBatch, epoch: int | None = None) -> Tensor:
    return task._hidden(batch, task.encoder.items(batch.item_ids), epoch)


@pytest.mark.parametrize(("name", "reading"), READINGS)
@pytest.mark.parametrize("backbone", ["hstu", "llama"])
def test_the_model_reads_them_as_written_out(name: str, reading: str, backbone: str) -> None:
    """Against the encoder over tokens put together by a loop."""
    task = retrieval(backbone, **options_of(name, reading)).eval()
    batch = batch_of([4, 1, 3])
    assert task.kinds is not None
    weights = dict(task.kinds.named_parameters())
    (weight,) = weights.values()
    codes = batch.actions if name == "behaviours" else DOMAINS.first()[batch.item_ids]
    assert codes is not None
    assert batch.times is not None
    assert batch.next_times is not None
    vectors = task.encoder.inputs(task.encoder.items(batch.item_ids))
    rows, times, after, where = [], [], [], []
    for event in range(batch.tokens):
        tokens = (
            [vectors[event] + weight[codes[event]]] if reading == "added" else [vectors[event], weight[codes[event]]]
        )
        rows += tokens
        times += [batch.times[event]] * len(tokens)
        after += [batch.next_times[event]] * len(tokens)
        where.append(len(rows) - 1)
    each = 1 if reading == "added" else 2
    layout = Layout(batch.offsets * each, task.encoder.max_seq_len, torch.stack(times), torch.stack(after))
    assert task.encoder.max_seq_len == each * 10 + 1
    wanted = task.encoder.through(torch.stack(rows), layout, torch.ones(len(rows), dtype=torch.bool))[where]
    torch.testing.assert_close(hidden(task, batch), wanted)


@pytest.mark.parametrize(("name", "reading"), READINGS)
def test_later_events_change_nothing_and_dropout_not_with_the_batch(name: str, reading: str) -> None:
    task = retrieval(**options_of(name, reading)).eval()
    batch = batch_of([5])
    changed = replace(batch, item_ids=batch.item_ids.clone(), actions=batch.actions.clone())  # type: ignore[union-attr]
    assert changed.actions is not None
    changed.item_ids[3:] = changed.item_ids[3:] % ITEMS + 1
    changed.actions[3:] = (changed.actions[3:] + 1) % ACTIONS
    before, after = hidden(task, batch), hidden(task, changed)
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3:], after[3:])
    both = batch_of([5, 3])
    own = {name: value[:5] for name in ("item_ids", "next_ids", "times", "next_times", "actions", "next_actions")
           if (value := getattr(both, name)) is not None}  # fmt: skip
    first = replace(both, sequence_ids=both.sequence_ids[:1], offsets=both.offsets[:2], **own)
    torch.testing.assert_close(hidden(task, both, 3)[:5], hidden(task, first, 3))


def test_only_events_of_the_target_are_trained() -> None:
    task = retrieval(target_actions=[0, 2])
    batch = batch_of([6, 2])
    every = retrieval()
    prepared = task.prepare(batch, 0)
    losses, weights = task.loss(prepared)
    assert batch.next_actions is not None
    chosen = torch.isin(batch.next_actions, torch.tensor([0, 2]))
    assert float(weights) == float(chosen.sum())
    total, _ = every.loss(every.prepare(batch, 0))
    others = retrieval(target_actions=[1])
    rest, _ = others.loss(others.prepare(batch, 0))
    torch.testing.assert_close(losses + rest, total)


class Listed:
    """What splits use of a SequenceStore."""

    has_times = has_actions = True

    def __init__(self, actions: list[list[int]]) -> None:
        self.actions, self.lengths = actions, np.array([len(user) for user in actions], np.int64)

    def gather(self, sequences: Any, starts: Any, stops: Any) -> Events:
        actions = [x for s, a, b in zip(sequences, starts, stops, strict=True) for x in self.actions[s][a:b]]
        items = [1 + i for _, a, b in zip(sequences, starts, stops, strict=True) for i in range(a, b)]
        return Events(np.array(items, np.int64), np.array(items, np.int64) * 10, np.array(actions, np.int64))


def test_the_last_events_of_the_target_are_held_out() -> None:
    store = Listed([[0, 1, 0, 1, 1, 0], [1, 0, 0], [0, 0, 0, 0], [0, 0, 1], [1, 1]])
    splits = leave_one_out(store, "holdout", 4, with_actions=True, target_actions=[1])  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name, split in splits.items():
        assert isinstance(split, LeaveOneOut)
        found[name] = dict(
            zip(split.sequences.tolist(), zip(split.starts.tolist(), split.stops.tolist(), strict=True), strict=True)
        )
    assert found["test"] == {0: (0, 5), 3: (0, 3), 4: (0, 2)}
    assert found["valid"] == {0: (0, 4)}
    # before the first event held out; whoever has none trains with all
    assert found["train"] == {0: (0, 3), 2: (0, 4), 3: (0, 2)}
    batch = splits["test"].batch(np.array([0]))
    assert batch.actions.tolist() == [0, 1, 0, 1]  # type: ignore[attr-defined]
    assert batch.next_actions.tolist() == [1, 0, 1, 1]  # type: ignore[attr-defined]


def test_metrics_of_each_domain() -> None:
    task = retrieval(domain_feature="domain").eval()
    batch = batch_of([4, 2, 5, 3])
    observed = task.observe(batch)
    last = batch.next_ids[batch.offsets[1:] - 1]
    assert observed[:, 1].tolist() == [1 if item % 2 else 2 for item in last.tolist()]
    ranks = observed[:, 0].double()
    values = task.metrics(observed, ["mrr"])
    assert values["mrr"] == pytest.approx(float((1 / ranks).mean()))
    for code, name in ((1, "books"), (2, "games")):
        own = ranks[observed[:, 1] == code]
        assert values[f"{name}/mrr"] == pytest.approx(float((1 / own).mean()))
    assert (observed[:, 1] == 1).any()
    none = task.metrics(observed[observed[:, 1] == 1], ["mrr"])
    assert math.isnan(none["games/mrr"])  # not 0, which an early stop would take for the best there can be


def test_a_domain_is_one_value_of_an_item(shops: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(shops.parent / "source", source)
    items = (source / "items.csv").read_text().replace("games", "games|books")
    (source / "items.csv").write_text(items)
    settings = ["task.options.domain_feature=domain", f"data.source={source}", f"data.dir={tmp_path / 'prepared'}"]
    with pytest.raises(ConfigError, match="items have several values of 'domain'; a domain is one"):
        train(load_run_config(shops, settings), run_dir=tmp_path / "run")


def test_a_list_of_a_parquet_file_is_several_values(tmp_path: Path) -> None:
    column = pl.Series([["b", "a"], None, [], ["c", None]])
    found = _codes(column, "|", np.array([1, 2, 3, 4]), 4)
    assert found.names == ["a", "b", "c"]
    assert found.values.tolist() == [2, 1, 3]
    assert found.offsets.tolist() == [0, 0, 2, 2, 2, 3]


def test_negative_actions_have_no_vectors(shops: Path, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(
        "user,item,timestamp,kind\n" + "".join(f"{u},{i},{i},{i % 3 - 1}\n" for u in range(9) for i in range(6))
    )
    settings = [
        f"data.source={tmp_path}", f"data.dir={tmp_path / 'prepared'}", "data.options.items_file=null",
        "data.options.action_values=null", "task.options.behaviours=added",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="behaviours needs actions of 0 or more, the data set has -1: set it to ign"):
        train(load_run_config(shops, settings), run_dir=tmp_path / "run")


def test_repeated_items_are_warned_of(shops: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(load_run_config(shops, ["train.max_steps=1"]), run_dir=tmp_path / "a")
    assert re.search(r"\d\d % of the held-out items are in the history of their user", caplog.text)
    caplog.clear()
    train(load_run_config(shops, ["train.max_steps=1", "eval.remove=none"]), run_dir=tmp_path / "b")
    assert "held-out items" not in caplog.text


def test_target_actions_on_ranks_that_share_sequences(shops: Path, tmp_path: Path) -> None:
    settings = ("task.options.target_actions=[2]", "train.max_steps=3")
    one = Job(str(shops), str(tmp_path / "one"), settings)
    two = Job(str(shops), str(tmp_path / "two"), (*settings, "parallel.context=2"))
    run_jobs([one])
    train_on_ranks(2, [two])
    assert column(tmp_path / "two", "loss") == pytest.approx(column(tmp_path / "one", "loss"), rel=1e-5)


# --- from files


SHOP = """
name: shops
data:
  name: interactions
  source: {source}
  dir: {prepared}
  options: {{file: events.csv, items_file: items.csv, action: kind, action_values: [view, cart, buy]}}
model: {{embedding_dim: 16, num_blocks: 1, num_heads: 1, attention_dim: 16, linear_dim: 16, max_seq_len: 16}}
task: {{name: retrieval, options: {{num_negatives: 8}}}}
train: {{epochs: 1, batch_size: 16}}
eval: {{protocol: holdout, metrics: [hr@10, ndcg@10], select: ndcg@10}}
device: {{backend: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shops")
    rng = np.random.default_rng(0)
    (folder / "source").mkdir()
    lines = ["user,item,timestamp,kind"]
    for user in range(40):
        for k in range(12):
            lines.append(f"{user},{rng.integers(20)},{10**9 + 100 * k},{rng.choice(['view', 'view', 'cart', 'buy'])}")
    (folder / "source/events.csv").write_text("\n".join(lines) + "\n")
    items = [f"{i},{'books' if i % 3 else 'games'}" for i in range(20)]
    (folder / "source/items.csv").write_text("\n".join(["item,domain", *items]) + "\n")
    (folder / "shops.yaml").write_text(SHOP.format(source=folder / "source", prepared=folder / "prepared"))
    return folder / "shops.yaml"


def test_behaviours_and_domains_together(shops: Path, tmp_path: Path) -> None:
    settings = [
        "task.options.behaviours=tokens", "task.options.target_actions=[2]", "task.options.domain_feature=domain",
        "task.options.domains=added", "eval.select=games/ndcg@10",
    ]  # fmt: skip
    result = train(load_run_config(shops, settings), run_dir=tmp_path / "run")
    values = result.metrics["test"]
    assert set(values) == {
        f"{domain}{metric}" for domain in ("", "books/", "games/") for metric in ("hr@10", "ndcg@10")
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task.options.domains=added"], "needs domain_feature"),
        (["task.options.domain_feature=colour"], "domain_feature: 'colour' is not a feature of the items"),
        (["task.options.target_actions=[1, 7]"], "no event has the action 7; they go up to 2"),
        (["task.options.target_actions=[1, 1]"], "target_actions: 1 is given twice"),
        (["eval.select=toys/hr@10", "task.options.domain_feature=domain"], "'toys' is not a domain; there are books"),
        (["eval.select=books/hr@10"], "eval.select: 'books/hr@10' is not among"),
        (
            ["task.options.behaviours=tokens", "data.options.action=null", "data.options.action_values=null"],
            "no actions",
        ),
    ],
)
def test_what_is_missing_is_said(shops: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_run_config(shops, settings), run_dir=tmp_path / "run")
