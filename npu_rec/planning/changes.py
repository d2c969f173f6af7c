"""Changes of a configuration that make a card hold less, in the order in which a person would try them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from npu_rec.config import Config, validate
from npu_rec.registry import resolve

Settings = dict[str, Any]


@dataclass(frozen=True)
class Shortage:
    """What does not fit.

    Attributes:
        cards: there are; memory: bytes of each; host_memory: of a node; cards_per_node.
        needed: bytes of the fullest card; lasting: of those, what does not depend on the batch.
        table_bytes: of all tables with their states; row_bytes: of one row.
        sequences: of the card with the most.
    """

    cards: int
    cards_per_node: int
    memory: int
    host_memory: int
    needed: int
    lasting: int
    table_bytes: int
    row_bytes: float
    sequences: int


def changes_for(config: Config, shortage: Shortage) -> Iterator[tuple[Settings, int]]:
    """Settings to try and on how many cards: one by one, then those that leave the numbers alone together."""
    cards = shortage.cards
    harmless = list(_harmless(config, shortage))
    yield from ((settings, cards) for settings in harmless)
    yield from ((settings, cards) for settings in _others(config, shortage))
    together = {name: value for settings in harmless for name, value in settings.items()}
    if len(harmless) > 1:
        yield together, cards
    smallest = cards // together.get("parallel.context", config.parallel.context)  # a sequence a group
    if harmless and config.train.batch_size > smallest:
        yield {**together, "train.batch_size": smallest}, cards
    more = 2
    while more * shortage.memory < shortage.needed:
        more *= 2
    yield from (({}, cards * times) for times in (more, 2 * more, 4 * more))


def _harmless(config: Config, shortage: Shortage) -> Iterator[Settings]:
    """What changes where things are and when they are computed, not what is computed."""
    cards = shortage.cards
    if not config.train.recompute:
        yield {"train.recompute": True}
    if cards > 1 and config.parallel.dense == "ddp":
        yield {"parallel.dense": "fsdp"}
    if cards > 1 and config.embedding.placement not in ("auto", "row_wise"):
        yield {"embedding.placement": "row_wise"}
    if cards > 1 and config.embedding.replicas > 1:
        yield {"embedding.replicas": 1}
    context = config.parallel.context * 2
    if cards % context == 0:  # a backbone that cannot says so
        yield {"parallel.context": context}
    sparse = config.embedding.optimizer != "dense" and config.embedding.engine == "native"
    if sparse and config.embedding.tier == "device" and config.embedding.replicas == 1:
        rows = int(shortage.memory / 2 / shortage.row_bytes)  # half of the card for hot rows
        on_node = shortage.table_bytes / cards * shortage.cards_per_node
        tier = "host" if on_node < 0.8 * shortage.host_memory else "disk"
        yield {"embedding.tier": tier, "embedding.rows": rows, "embedding.eviction": "lru"}


def _others(config: Config, shortage: Shortage) -> Iterator[Settings]:
    if config.train.precision == "fp32":
        yield {"train.precision": "bf16"}
    if config.embedding.optimizer == "dense" and config.embedding.placement != "replicated":
        sparse = {"embedding.optimizer": "rowwise_adagrad", "train.accumulate": 1}
        yield sparse if config.train.clip_norm is None else {**sparse, "train.clip": "dense"}
    each = (shortage.needed - shortage.lasting) / shortage.sequences
    sequences = int(0.95 * (shortage.memory - shortage.lasting) / each)
    if 1 <= sequences < shortage.sequences:
        yield {"train.batch_size": sequences * (shortage.cards // config.parallel.context)}


def changed(config: Config, settings: Settings) -> Config:
    """The configuration with other settings, validated and resolved.

    Raises:
        ConfigError: they do not go together.
    """
    raw = config.model_dump(mode="json")
    for name, value in settings.items():
        section, key = name.split(".")
        raw[section][key] = value
    return resolve(validate(Config, raw, {(): "changed configuration"}))
