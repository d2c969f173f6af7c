"""A small retrieval task, batches for it, and what it draws and loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from strategies import generator, normal
from torch import Tensor

from npu_rec.config import Config
from npu_rec.data.batch import JaggedBatch
from npu_rec.ops.jagged import lengths_to_offsets, position_of_token, sequence_of_token
from npu_rec.ops.random import random_key
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, Retrieval, build_task, retrieval

CATALOGUE = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]  # of ids up to 30
COUNTS = [0, 0, 9, 1, 4, 3, 0, 8, 0, 0, 0, 5, 0, 2, 0, 0, 0, 6, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3]
LENGTHS = [4, 1, 6, 3]
STRATEGIES = ["uniform", "in_batch", "popularity"]

Draws = dict[str, Tensor]


def facts(**changes: Any) -> DataFacts:
    given = {"num_items": 30, "catalogue": CATALOGUE, "item_counts": COUNTS, "has_times": True} | changes
    return DataFacts(**{k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()})


def config_of(model: dict[str, Any] | None = None, seed: int = 3, **options: Any) -> Config:
    small = {"embedding_dim": 8, "num_heads": 2, "attention_dim": 3, "linear_dim": 4, "max_seq_len": 8}
    given = {"model": small | (model or {}), "train": {"seed": seed}}
    return resolve(Config(**given, task={"options": {"num_negatives": 6, "temperature": 0.2} | options}))


def task_of(model: dict[str, Any] | None = None, about: DataFacts | None = None, **options: Any) -> Retrieval:
    """A task in evaluation mode, with weights large enough for scores to differ."""
    task = build_task(config_of(model, **options), about or facts())
    assert isinstance(task, Retrieval)
    with torch.no_grad():
        for number, parameter in enumerate(task.parameters()):
            parameter.copy_(normal(generator(number), *parameter.shape, scale=0.5))
    return task.eval()


def batch_of(lengths: list[int] = LENGTHS, ids: list[int] | None = None, times: bool = True) -> JaggedBatch:
    """Sequences of catalogue items; the events of a sequence depend on its id alone."""
    ids = list(range(100, 100 + len(lengths))) if ids is None else ids
    events, seconds = [], []
    for name, n in zip(ids, lengths, strict=True):
        g = generator(name)
        events.append(torch.tensor(CATALOGUE)[torch.randint(len(CATALOGUE), (n + 1,), generator=g)])
        seconds.append(torch.randint(1, 10**5, (n + 1,), generator=g).cumsum(0))
    empty = torch.zeros(0, dtype=torch.int64)
    columns = {
        "item_ids": torch.cat([own[:-1] for own in events] + [empty]),
        "next_ids": torch.cat([own[1:] for own in events] + [empty]),
        "times": torch.cat([own[:-1] for own in seconds] + [empty]) if times else None,
        "next_times": torch.cat([own[1:] for own in seconds] + [empty]) if times else None,
    }
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    return JaggedBatch(torch.tensor(ids, dtype=torch.int64), offsets, **columns)  # type: ignore[arg-type]


def removing(batch: JaggedBatch, *removed: list[int]) -> JaggedBatch:
    own = {name: value for name, value in vars(batch).items() if value is not None}
    items = torch.tensor([x for row in removed for x in row], dtype=torch.int64)
    return JaggedBatch(
        **own, removed=items, removed_offsets=lengths_to_offsets(torch.tensor([len(r) for r in removed]))
    )


def drawn(task: Retrieval, batch: JaggedBatch, epoch: int) -> Tensor:
    """Item ids `[T, R]` of the negatives, drawn with the key of each position."""
    sequences = batch.sequence_ids[sequence_of_token(batch.offsets, batch.tokens)]
    keys = random_key(3, "negatives", epoch, sequences, position_of_token(batch.offsets, batch.tokens))
    columns = task.sampler.draw(keys, task.options.num_negatives, task.catalogue.column(batch.next_ids))
    return task.catalogue.items(columns)


def loss_of(task: Retrieval, batch: JaggedBatch, epoch: int) -> tuple[Tensor, Tensor]:
    return task.loss(task.prepare(batch, epoch))


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The negatives, as columns of the catalogue, and the loss per token of each call."""
    seen: list[tuple[Tensor, Tensor]] = []
    real_loss, real_play, last = retrieval.sampled_softmax_loss, Retrieval._in_play, []

    def play(self: Retrieval, positives: Tensor, drawn: Draws) -> tuple[Tensor, Tensor, Draws]:
        last.append(drawn["negatives"])
        return real_play(self, positives, drawn)

    def loss(*arguments: Any, **keywords: Any) -> Tensor:
        losses = real_loss(*arguments, **keywords)
        seen.append((last.pop(), losses.detach()))
        return losses

    with monkeypatch.context() as patched:
        patched.setattr(retrieval, "sampled_softmax_loss", loss)
        patched.setattr(Retrieval, "_in_play", play)
        yield seen


def gradients(task: Retrieval, total: Tensor) -> dict[str, Tensor]:
    task.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}
