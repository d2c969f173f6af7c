"""Retrieval: predict the next item, rank the whole catalogue (HSTU, arXiv 2402.17152, section 4.1.1)."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from npu_rec.config import Config
from npu_rec.data import SequenceStore
from npu_rec.data.batch import JaggedBatch
from npu_rec.data.features import Wanted
from npu_rec.data.splits import Split, leave_one_out
from npu_rec.distributed import World
from npu_rec.distributed.context import ContextShard, context_shard, context_world
from npu_rec.distributed.world import ALONE
from npu_rec.errors import ConfigError
from npu_rec.evaluation.ranking import compute_metrics
from npu_rec.models import Layout
from npu_rec.models.encoder import unit
from npu_rec.ops import sampled_softmax_loss
from npu_rec.ops.jagged import offsets_to_lengths, position_of_token, sequence_of_token
from npu_rec.ops.random import random_key
from npu_rec.registry import register
from npu_rec.tasks.catalogue import Catalogue
from npu_rec.tasks.catalogue_part import CataloguePart
from npu_rec.tasks.event_kinds import EventKinds, Reading
from npu_rec.tasks.item_contrast import ItemContrast
from npu_rec.tasks.negatives import NegativeSampler
from npu_rec.tasks.retrieval_options import RetrievalOptions
from npu_rec.tasks.scoring import Pairs, Scorer
from npu_rec.tasks.task import DataFacts, Prepared, Task, build_encoder, check_actions, leave_one_out_protocol

log = logging.getLogger(__name__)
AT_ONCE = 1 << 24
"""Numbers that `loss: bce` gathers at once, 64 MiB; the backward pass gathers them again."""
REPEATS = 0.01
"""Share of the held-out items that may be in the history of their user without a warning."""


@register("task", "retrieval", options=RetrievalOptions)
class Retrieval(Task):
    """User and item vectors of length 1; cosine similarity over a temperature."""

    takes_context = True
    log_q: Tensor | None  # [C]
    domain_of_item: Tensor | None  # [num_items + 1]

    @classmethod
    def needs_item_counts(cls, options: Any) -> bool:
        return bool(options.negatives == "popularity" or options.log_q)

    @classmethod
    def check(cls, config: Config, options: Any) -> None:
        chosen = config.eval.select
        by_domain = "/" in chosen and options.domain_feature is not None
        select = chosen.rpartition("/")[2] if by_domain else chosen
        evaluation = config.eval.model_copy(update={"select": select})
        super().check(config.model_copy(update={"eval": evaluation}), options)

    @classmethod
    def plannable(cls, options: Any) -> bool:
        return not options.reads_actions and options.domain_feature is None

    @classmethod
    def wanted_features(cls, options: Any) -> Wanted:
        return Wanted([] if options.domain_feature is None else [options.domain_feature], key="domain_feature")

    @classmethod
    def make_splits(cls, store: SequenceStore, config: Config, options: Any) -> dict[str, Split]:
        protocol = leave_one_out_protocol(config)
        if options.reads_actions and not store.has_actions:
            wanting = "behaviours" if options.target_actions is None else "target_actions"
            raise ConfigError(f"task.options.{wanting}: {config.data.name} has no actions")
        if options.behaviours != "ignored":
            check_actions(store, "task.options.behaviours", "set it to ignored")
        unknown = [action for action in options.target_actions or [] if action >= store.num_actions]
        if unknown:
            raise ConfigError(
                f"task.options.target_actions: no event has the action {unknown[0]}; they go up to "
                f"{store.num_actions - 1}"
            )
        splits = leave_one_out(
            store,
            protocol,
            config.model.max_seq_len,
            with_actions=options.reads_actions,
            target_actions=options.target_actions,
        )
        _warn_of_repeats(splits["test"], config)
        return splits

    def __init__(self, config: Config, options: Any, facts: DataFacts, world: World = ALONE) -> None:
        super().__init__(config, options, facts, world)
        self.options: RetrievalOptions = options
        self.seed = config.train.seed
        self.backend = config.ops.sampled_softmax_loss
        domains = None if options.domain_feature is None else facts.features.items[options.domain_feature]
        if domains is not None and domains.several:
            raise ConfigError(
                f"task.options.domain_feature: items have several values of {options.domain_feature!r}; a domain is one"
            )
        self.register_buffer("domain_of_item", None if domains is None else domains.first(), persistent=False)
        self.domain_names = [] if domains is None else list(domains.names)
        domain = config.eval.select.rpartition("/")[0]
        if domain and domain not in self.domain_names:
            raise ConfigError(f"eval.select: {domain!r} is not a domain; there are {', '.join(self.domain_names)}")
        self.kinds = self._event_kinds(config.model.embedding_dim, facts.num_actions)
        each = 1 if self.kinds is None else self.kinds.tokens_per_event
        self.encoder = build_encoder(config, facts, world, max_seq_len=each * config.model.max_seq_len)
        self.tables = self.encoder.tables
        self.context_world = context_world(world, config.parallel.context)
        if self.context_world.size > 1 and not self.encoder.backbone.takes_context:
            raise ConfigError(f"parallel.context: model.backbone {config.model.backbone} cannot share sequences")
        if self.context_world.size > 1 and self.kinds is not None:
            raise ConfigError("parallel.context: sequences with behaviours or domains cannot be shared")
        self.catalogue = Catalogue(facts.catalogue)
        self.scorer = Scorer(CataloguePart(self.catalogue, self.tables, "items", world), world)
        counts = None if facts.item_counts is None else facts.item_counts[self.catalogue.all_items(torch.device("cpu"))]
        self.sampler = NegativeSampler(options.negatives, len(self.catalogue), counts, world.twin())
        log_q = self.sampler.log_q() if options.log_q else None
        self.register_buffer("log_q", log_q, persistent=False)
        self.contrast: ItemContrast | None = None
        if options.ssl_weight:
            self.contrast = ItemContrast(
                self.seed,
                len(self.catalogue),
                options.ssl_items,
                options.ssl_dropout,
                options.ssl_temperature,
                self.backend,
            )

    def _event_kinds(self, width: int, num_actions: int) -> EventKinds | None:
        """What of events the model reads besides their items."""
        readings: dict[str, Reading] = {"behaviour": self.options.behaviours, "domain": self.options.domains}
        sizes = {"behaviour": num_actions, "domain": 1 + len(self.domain_names)}
        sizes = {name: size for name, size in sizes.items() if readings[name] != "ignored"}
        return EventKinds(sizes, readings, width) if sizes else None

    def prepare(self, batch: JaggedBatch, epoch: int) -> Prepared:
        context = None
        if self.context_world.size > 1:
            context = context_shard(self.context_world, batch.offsets, batch.times)
            batch = _part_of(batch, context)
        tokens = _tokens(batch, context)
        keys = random_key(self.seed, "negatives", epoch, *tokens)
        positives = self.catalogue.column(batch.next_ids)
        drawn = {"negatives": self.sampler.draw(keys, self.options.num_negatives, positives)}
        if self.contrast is not None:
            drawn["contrast"] = self.contrast.draw(epoch, *tokens)
        columns, positives, drawn = self._in_play(positives, drawn)
        # one lookup for inputs and candidates: a row is updated once a step; being a candidate is not being seen
        wanted = torch.cat([batch.item_ids, self.catalogue.items(columns)])
        seen = torch.zeros_like(wanted)
        seen[: batch.tokens] = 1
        plan = self.tables.plan({"items": wanted}, {"items": seen})
        draws = {"columns": columns, "positives": positives, **drawn}
        return Prepared(batch, epoch, draws, plan, context)

    def loss(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        batch, draws = prepared.batch, prepared.draws
        vectors = self.tables.lookup(prepared.plan)["items"]
        inputs, candidates = vectors.split([batch.tokens, draws["columns"].shape[0]])
        hidden = self._hidden(batch, inputs, prepared.epoch if self.training else None, prepared.context)
        queries, rows = unit(hidden.float()), unit(candidates.float())
        log_q = None
        if self.log_q is not None:
            log_q = self.sampler.correction(self.log_q[draws["columns"]], max(1, batch.tokens) * self.world.size)
        if self.options.loss == "bce":
            losses = self._bce(queries, rows, draws["positives"], draws["negatives"], log_q)
        else:
            losses = sampled_softmax_loss(
                queries,
                rows,
                draws["positives"],
                draws["negatives"],
                temperature=self.options.temperature,
                log_q=log_q,
                backend=self.backend,
            )
        if self.contrast is not None:
            items = self.catalogue.items(draws["columns"])
            contrast = self.contrast.loss(prepared.epoch, items, candidates, draws["contrast"])
            losses = losses + self.options.ssl_weight * contrast
        if self.options.target_actions is None:
            return losses.sum(), losses.new_tensor(float(batch.tokens))
        assert batch.next_actions is not None
        wanted = torch.zeros_like(batch.next_actions, dtype=torch.bool)
        for action in self.options.target_actions:
            wanted |= batch.next_actions == action
        return (losses * wanted).sum(), wanted.sum().to(losses.dtype)

    def _hidden(
        self, batch: JaggedBatch, vectors: Tensor, epoch: int | None, context: ContextShard | None = None
    ) -> Tensor:
        """Hidden states `[T, E]` that predict the event after each.

        Args:
            vectors: `[T, E]`, the rows of the items.
            epoch: of the dropout; None: there is none.
        """

        def keys(sequences: Tensor, places: Tensor) -> Tensor:
            assert epoch is not None
            return random_key(self.seed, "dropout", epoch, batch.sequence_ids[sequences], places)

        if self.kinds is None:
            dropout_keys = None
            if epoch is not None:
                dropout_keys = random_key(self.seed, "dropout", epoch, *_tokens(batch, context))
            times = batch.times, batch.next_times
            hidden: Tensor = self.encoder(batch.item_ids, batch.offsets, *times, dropout_keys, vectors, context)
            return hidden
        kinds = {}
        if self.options.behaviours != "ignored":
            if batch.actions is None:
                raise ConfigError("task.options.behaviours: histories without actions cannot be read")
            kinds["behaviour"] = batch.actions
        if self.domain_of_item is not None:
            kinds["domain"] = self.domain_of_item[batch.item_ids]
        layout = Layout(batch.offsets, self.encoder.max_seq_len, batch.times, batch.next_times)
        x, layout, places = self.kinds.arrange(
            self.encoder.inputs(vectors), kinds, layout, None if epoch is None else keys
        )
        present = (batch.item_ids != 0).repeat_interleave(self.kinds.tokens_per_event)
        return self.encoder.through(x, layout, present)[places]

    def _in_play(self, positives: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Columns whose vectors are needed, and positives and what is drawn as indices into them."""
        size, optimizer = len(self.catalogue), self.encoder.items.optimizer
        if sum(each.numel() for each in drawn.values()) >= size:  # nearly all are needed
            every = torch.arange(size, device=positives.device)
            if not self.tables.needs_plan and (optimizer is None or optimizer.name != "rowwise_adam"):
                return every, positives, drawn  # a row more changes nothing
            needed = torch.zeros(size, dtype=torch.bool, device=positives.device)
            for wanted in (positives, *drawn.values()):
                needed[wanted.flatten()] = True
            place = torch.cumsum(needed, 0) - 1
            return every[needed], place[positives], {name: place[each] for name, each in drawn.items()}
        columns, index = torch.unique(torch.cat([positives.unsqueeze(1), *drawn.values()], 1), return_inverse=True)
        own, *rest = (part.contiguous() for part in index.split([1, *(each.shape[1] for each in drawn.values())], 1))
        return columns, own[:, 0], dict(zip(drawn, rest, strict=True))

    def _bce(self, queries: Tensor, rows: Tensor, positives: Tensor, negatives: Tensor, log_q: Tensor | None) -> Tensor:
        positive = (queries * rows[positives]).sum(1) / self.options.temperature
        each = max(1, AT_ONCE // max(1, negatives.shape[1] * rows.shape[1]))  # never [T, R, E] at once
        if len(queries) <= each:
            negative = _products(queries, rows, negatives)
        else:
            parts = zip(queries.split(each), negatives.split(each), strict=True)
            negative = torch.cat([checkpoint(_products, q, rows, drawn, use_reentrant=False) for q, drawn in parts])
        negative = negative / self.options.temperature
        if log_q is not None:
            positive, negative = positive - log_q[positives], negative - log_q[negatives]
        counted = negatives != positives.unsqueeze(1)
        of_negatives = (softplus(negative) * counted).sum(1) / counted.sum(1).clamp_min(1)
        return softplus(-positive) + of_negatives

    def train(self, mode: bool = True) -> Retrieval:
        self.scorer.part.forget()  # the catalogue's vectors hold until training goes on
        return super().train(mode)

    def _users(self, batch: JaggedBatch) -> Tensor:
        """`[B, E]` float32 of length 1; zeros where there is no history."""
        if self.training:
            self.scorer.part.forget()
        vectors = self.tables.read("items", batch.item_ids)
        hidden = self._hidden(batch, vectors, None)
        users = hidden.new_zeros(batch.sequence_ids.shape[0], hidden.shape[1])
        some = offsets_to_lengths(batch.offsets) > 0
        users[some] = hidden[batch.offsets[1:][some] - 1]
        return unit(users.float())

    def _removed(self, batch: JaggedBatch) -> Pairs:
        """What leaves the ranking of each sequence."""
        if batch.removed is None or batch.removed_offsets is None:
            return Pairs(batch.offsets[:0], batch.offsets[:0])
        columns = self.catalogue.column(batch.removed)
        rows = sequence_of_token(batch.removed_offsets, columns.shape[0])
        return Pairs(rows[columns >= 0], columns[columns >= 0])

    def _targets(self, batch: JaggedBatch) -> Tensor:
        """Columns `[B]` of the held-out items."""
        return self.catalogue.column(batch.next_ids[batch.offsets[1:] - 1])

    def ranks(self, batch: JaggedBatch) -> Tensor:
        """Rank, from 1, of each held-out item, `[B]`; it stays in the ranking even where the history contains it."""
        return self.scorer.ranks(self._users(batch), self._targets(batch), self._removed(batch))

    def observe(self, batch: JaggedBatch) -> Tensor:
        """Ranks `[B]`; where items have domains, ranks and the domain of the held-out item, `[B, 2]`."""
        ranks = self.ranks(batch)
        if self.domain_of_item is None:
            return ranks
        return torch.stack([ranks, self.domain_of_item[batch.next_ids[batch.offsets[1:] - 1]]], 1)

    def metrics(self, observed: Tensor, names: list[str]) -> dict[str, float]:
        """Of all, and as `<domain>/<name>` of those whose held-out item is in a domain."""
        if observed.dim() == 1:
            return compute_metrics(observed, names)
        ranks, domains = observed.unbind(1)
        values = compute_metrics(ranks, names)
        for code, domain in enumerate(self.domain_names, 1):
            here = domains == code
            own = compute_metrics(ranks[here], names) if bool(here.any()) else dict.fromkeys(names, math.nan)
            values |= {f"{domain}/{name}": value for name, value in own.items()}
        return values

    def top_k(self, batch: JaggedBatch, k: int) -> tuple[Tensor, Tensor]:
        columns, scores = self.scorer.top_k(self._users(batch), k, self._removed(batch))
        return torch.where(scores.isfinite(), self.catalogue.items(columns), 0), scores

    def log_likelihood(self, batch: JaggedBatch) -> Tensor:
        """By the softmax of cosine / temperature; nothing is sampled and nothing taken out."""
        return self.scorer.log_likelihood(self._users(batch), self._targets(batch), self.options.temperature)

    def flops(self, lengths: Tensor) -> float:
        similarities = self.options.num_negatives + 1 + (0 if self.contrast is None else self.options.ssl_items)
        loss = 2.0 * self.encoder.items.spec.dim * similarities
        tokens = lengths if self.kinds is None else lengths * self.kinds.tokens_per_event
        return self.encoder.flops(tokens) + loss * float(lengths.sum())


def _tokens(batch: JaggedBatch, context: ContextShard | None) -> tuple[Tensor, Tensor]:
    """Sequence id and position of every token, `[T]` each: what random draws are keyed by."""
    sequences = sequence_of_token(batch.offsets, batch.tokens)
    positions = position_of_token(batch.offsets, batch.tokens) if context is None else context.positions
    return batch.sequence_ids[sequences], positions


def _warn_of_repeats(split: Split, config: Config) -> None:
    """Say so where users repeat items: with their history out of the ranking, the true item alone is left of it."""
    if config.eval.remove == "none" or len(split) == 0:
        return
    batch = split.batch(np.arange(min(len(split), 10_000)), config.eval.remove)
    assert isinstance(batch, JaggedBatch)
    assert batch.removed is not None
    assert batch.removed_offsets is not None
    held_out = batch.next_ids[batch.offsets[1:] - 1]
    owners = sequence_of_token(batch.removed_offsets, len(batch.removed))
    repeated = torch.zeros(len(held_out), dtype=torch.bool)
    repeated[owners[batch.removed == held_out[owners]]] = True
    share = float(repeated.double().mean())
    if share > REPEATS:
        log.warning(
            "%.0f %% of the held-out items are in the history of their user. The history leaves the ranking and they "
            "stay, which makes them easy to find: eval.remove: none keeps all items in it",
            100 * share,
        )


def _products(queries: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
    """`[T, R]` of `queries [T, E]` with the rows `drawn [T, R]`."""
    return torch.einsum("te,tre->tr", queries, rows[drawn])


def _part_of(batch: JaggedBatch, context: ContextShard) -> JaggedBatch:
    """The tokens of a batch that are on this rank."""
    names = ("item_ids", "next_ids", "times", "next_times", "actions", "next_actions")
    given = {name: value for name in names if (value := getattr(batch, name)) is not None}
    return replace(batch, offsets=context.offsets, **{name: context.local(value) for name, value in given.items()})
