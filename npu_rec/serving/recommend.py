"""Top-k items after a history, from a checkpoint alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from npu_rec.config import load_resolved
from npu_rec.data.batch import JaggedBatch
from npu_rec.errors import ConfigError, DataError
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.registry import lookup, resolve
from npu_rec.tasks import Task, build_task
from npu_rec.train.checkpoint import open_checkpoint, read_items
from npu_rec.train.setup import open_device
from npu_rec.train.state import load_weights

log = logging.getLogger(__name__)
_USERS_AT_ONCE = 256


@dataclass(frozen=True)
class History:
    """What is known of a user: raw item ids, oldest first, with their times in seconds, or None."""

    user: str
    items: list[str]
    times: list[int] | None
    at: int | None = None


@dataclass(frozen=True)
class Recommendation:
    """The answer for one user, best first."""

    user: str
    items: list[dict[str, Any]]


class Recommender:
    """A model, its item map and its device.

    Args:
        path: a checkpoint folder.
        backend: `device.backend` to use instead of the one trained on.
    """

    def __init__(self, path: Path, backend: str | None = None) -> None:
        checkpoint = open_checkpoint(path)
        config = resolve(load_resolved(checkpoint.config_path, [f"device.backend={backend}"] if backend else None))
        if lookup("task", config.task.name).target.top_k is Task.top_k:
            raise ConfigError(f"{path}: task {config.task.name} makes no recommendations")
        options = config.task.options
        if options.get("behaviours", "ignored") != "ignored" or options.get("domain_feature") is not None:
            raise ConfigError(f"{path}: its model reads behaviours or domains, which a history of ids does not have")
        self.device = open_device(config)
        self.task = build_task(config, checkpoint.facts())
        load_weights(self.task, checkpoint, str(path))
        self.task.to(self.device.torch_device).eval()
        self.max_seq_len, self.has_times = config.model.max_seq_len, bool(checkpoint.state["has_times"])
        items = read_items(checkpoint.items_path)
        ids, raw = items.column("item_id").to_pylist(), [str(x) for x in items.column("raw_id").to_pylist()]
        self.id_of_raw = dict(zip(raw, ids, strict=True))
        self.raw_of_id = dict(zip(ids, raw, strict=True))
        titles = items.column("title").to_pylist() if "title" in items.column_names else [None] * len(ids)
        self.title_of_id = dict(zip(ids, titles, strict=True))

    @torch.no_grad()
    def recommend(self, histories: Sequence[History], k: int, at: int | None = None) -> list[Recommendation]:
        """The best `k` items for each history, its own items left out.

        Args:
            at: request time in seconds; a history's own comes first, its last event's time is the default.

        Raises:
            DataError: an item is unknown, or times are not in order.
        """
        answers = []
        for start in range(0, len(histories), _USERS_AT_ONCE):
            some = histories[start : start + _USERS_AT_ONCE]
            ids, scores = self.task.top_k(self._batch(some, at).to(self.device.torch_device), k)
            for history, row, row_scores in zip(some, ids.tolist(), scores.tolist(), strict=True):
                pairs = [(item, score) for item, score in zip(row, row_scores, strict=True) if item]
                answers.append(Recommendation(history.user, [self._shown(item, score) for item, score in pairs]))
        return answers

    def _shown(self, item: int, score: float) -> dict[str, Any]:
        title = self.title_of_id.get(item)
        return {"id": self.raw_of_id[item], "score": score} | ({"title": title} if title is not None else {})

    def _batch(self, histories: Sequence[History], at: int | None) -> JaggedBatch:
        items, times, next_times, seen, lengths = [], [], [], [], []
        for history in histories:
            unknown = [raw for raw in history.items if raw not in self.id_of_raw]
            if unknown:
                raise DataError(f"user {history.user}: item {unknown[0]!r} is not in the model's catalogue")
            if not history.items:
                raise DataError(f"user {history.user}: an empty history; give at least one item")
            own = history.times if history.times is not None else [0] * len(history.items)
            if self.has_times and any(a > b for a, b in pairwise(own)):
                raise DataError(f"user {history.user}: times must not go back; give the oldest event first")
            request = history.at if history.at is not None else at
            if history.times is None:
                if request is not None and self.has_times:
                    raise DataError(f"user {history.user}: a request time needs the times of the events, ID@TIME")
                request = 0
            elif request is None:
                request = own[-1]
            elif self.has_times and request < own[-1]:
                raise DataError(f"user {history.user}: request time {request} lies before the last event, {own[-1]}")
            ids = [self.id_of_raw[raw] for raw in history.items]
            seen.append(ids)
            items += ids[-self.max_seq_len :]
            times += own[-self.max_seq_len :]
            next_times += [*own[1:], request][-self.max_seq_len :]
            lengths.append(min(len(ids), self.max_seq_len))
        if self.has_times and any(history.times is None for history in histories):
            log.warning("histories without times: all their events count as simultaneous")

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64)

        item_ids = tensor(items)
        return JaggedBatch(
            sequence_ids=torch.arange(len(histories)),
            offsets=lengths_to_offsets(tensor(lengths)),
            item_ids=item_ids,
            next_ids=torch.zeros_like(item_ids),
            times=tensor(times) if self.has_times else None,
            next_times=tensor(next_times) if self.has_times else None,
            removed=tensor([i for ids in seen for i in ids]),
            removed_offsets=lengths_to_offsets(tensor([len(ids) for ids in seen])),
        )


def parse_history(text: str, user: str = "-", at: int | None = None) -> History:
    """`ID[@TIME],ID[@TIME],...`, oldest first, times in seconds for all items or for none.

    Raises:
        DataError: a time is not an integer, or only some items have one.
    """
    items, times = [], []
    for part in (p.strip() for p in text.split(",")):
        if not part:
            raise DataError(f"history {text!r}: an empty item; expected ID[@TIME],ID[@TIME],...")
        item, at_sign, time = part.rpartition("@")
        if at_sign:
            if not _is_time(time):
                raise DataError(
                    f"history {text!r}: {part!r}: the time must be whole seconds "
                    "(ids with @ or a comma: JSON lines, --users)"
                )
            times.append(int(time))
        items.append(item if at_sign else part)
    if times and len(times) != len(items):
        raise DataError(f"history {text!r}: {len(times)} of {len(items)} items have a time; give all or none")
    return History(user, items, times or None, at)


def read_users(path: Path) -> list[History]:
    """Histories from a file: JSON lines `{"user", "history": [ids], "times": [seconds]?, "at": seconds?}`, or text
    lines `USER<TAB>ID[@TIME],ID[@TIME],...[<TAB>REQUEST_TIME]`. Blank lines are skipped.

    Raises:
        DataError: with file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    histories = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            histories.append(_from_json(line) if line.lstrip().startswith("{") else _from_text(line))
        except (DataError, ValueError) as error:
            raise DataError(f"{path}: line {number}: {error}") from None
    if not histories:
        raise DataError(f"{path}: holds no histories")
    return histories


def _is_time(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 18  # fits int64


def _from_text(line: str) -> History:
    fields = line.rstrip("\n").split("\t")
    if len(fields) not in (2, 3):
        raise DataError(f"{len(fields)} tab-separated fields; expected USER, HISTORY and maybe REQUEST_TIME")
    if len(fields) == 3 and not _is_time(fields[2].strip()):
        raise DataError(f"request time {fields[2]!r} is not whole seconds")
    return parse_history(fields[1], fields[0], int(fields[2]) if len(fields) == 3 else None)


def _from_json(line: str) -> History:
    value = json.loads(line)
    unknown = sorted(set(value) - {"user", "history", "times", "at"})
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}; there are user, history, times and at")
    items, times, at = value.get("history"), value.get("times"), value.get("at")
    if not isinstance(items, list) or not all(isinstance(x, (str, int)) for x in items):
        raise DataError("`history` must be a list of item ids")
    if times is not None and (
        not isinstance(times, list) or not all(isinstance(t, int) and _is_time(str(t)) for t in times)
    ):
        raise DataError("`times` must be a list of whole seconds")
    if times is not None and len(times) != len(items):
        raise DataError(f"{len(times)} times for {len(items)} items")
    if at is not None and not (isinstance(at, int) and _is_time(str(at))):
        raise DataError("`at` must be whole seconds")
    return History(str(value.get("user", "-")), [str(x) for x in items], times, at)
