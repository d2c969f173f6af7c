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
        needed: bytes of the fullest card; lasting: of those, what does not depend on the batch; fixed: of those, what
            more cards do not change.
        held: bytes of its rows with their states; row_bytes: of one row.
        sequences: of the card with the most.
    """

    cards: int
    cards_per_node: int
    memory: int
    host_memory: int
    needed: int
    lasting: int
    fixed: int
    held: int
    row_bytes: float
    sequences: int


@dataclass(frozen=True)
class Change:
    """A change of the configuration, and the bytes of the fullest card with it; None: it cannot run so.

    Attributes:
        same_training: it changes where things are and when they are computed, not what is learnt.
    """

    settings: dict[str, Any]
    cards: int
    bytes_per_card_max: int | None
    fits: bool
    same_training: bool
    reason: str = ""


def harmless(config: Config, shortage: Shortage) -> Iterator[Settings]:
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
        left = shortage.memory - (shortage.needed - shortage.held)  # beside everything else on a card
        rows = int(0.9 * (left if left > 0 else shortage.memory / 2) / shortage.row_bytes)
        tier = "host" if shortage.held * shortage.cards_per_node < 0.8 * shortage.host_memory else "disk"
        if rows > 0:
            yield {"embedding.tier": tier, "embedding.rows": rows, "embedding.eviction": "lru"}


def others(config: Config, shortage: Shortage) -> Iterator[Settings]:
    """What trains another model, or with other batches."""
    if config.train.precision == "fp32":
        yield {"train.precision": "bf16"}
    if config.embedding.optimizer == "dense" and config.embedding.placement != "replicated":
        sparse: Settings = {"embedding.optimizer": "rowwise_adagrad"}
        sparse |= {"train.accumulate": 1} if config.train.accumulate > 1 else {}
        yield sparse | ({} if config.train.clip_norm is None else {"train.clip": "dense"})
    each = (shortage.needed - shortage.lasting) / shortage.sequences
    sequences = int(0.95 * (shortage.memory - shortage.lasting) / each)
    if 1 <= sequences < shortage.sequences:
        yield {"train.batch_size": sequences * (shortage.cards // config.parallel.context)}


def smallest_batch(config: Config, settings: Settings, cards: int) -> Settings | None:
    """The settings with a sequence for each card (each group of `parallel.context`); None: there are no more now."""
    smallest = cards // settings.get("parallel.context", config.parallel.context)
    return {**settings, "train.batch_size": smallest} if config.train.batch_size > smallest else None


def more_cards(shortage: Shortage, most: int) -> Iterator[int]:
    """Numbers of cards, `most` at most, that may be enough; none where what each holds anyway is too much."""
    if shortage.fixed >= shortage.memory:
        return
    cards = shortage.cards * 2
    while (shortage.needed - shortage.fixed) * shortage.cards / cards + shortage.fixed > shortage.memory:
        cards *= 2
    yield from (n for n in (cards, 2 * cards, 4 * cards) if n <= most)


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
