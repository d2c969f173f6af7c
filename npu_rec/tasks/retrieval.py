"""Retrieval: predict the next item, rank the whole catalogue (HSTU, arXiv 2402.17152, section 4.1.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from npu_rec.config import Config, Section
from npu_rec.data.batch import JaggedBatch
from npu_rec.distributed import World
from npu_rec.distributed.context import ContextShard, context_shard, context_world
from npu_rec.distributed.world import ALONE
from npu_rec.errors import ConfigError
from npu_rec.evaluation.ranking import compute_metrics
from npu_rec.models.encoder import SequenceEncoder, unit
from npu_rec.ops import sampled_softmax_loss
from npu_rec.ops.jagged import offsets_to_lengths, position_of_token, sequence_of_token
from npu_rec.ops.random import random_key
from npu_rec.registry import options_of, register
from npu_rec.tasks.catalogue import Catalogue
from npu_rec.tasks.catalogue_part import CataloguePart
from npu_rec.tasks.item_contrast import ItemContrast
from npu_rec.tasks.negatives import NegativeSampler, Strategy
from npu_rec.tasks.scoring import Pairs, Scorer
from npu_rec.tasks.task import DataFacts, Prepared, Task, check_backbone


class RetrievalOptions(Section):
    """`task.options` of `retrieval`."""

    loss: Literal["sampled_softmax", "bce"] = Field(
        "sampled_softmax",
        description="`bce`: binary cross entropy of the positive and, averaged, of the negatives.",
    )
    temperature: float = Field(0.05, gt=0, description="Cosine similarities are divided by it.")
    negatives: Strategy = Field("uniform", description="Where negatives come from.")
    num_negatives: int = Field(128, ge=1, description="Negatives R of each position.")
    log_q: bool = Field(False, description="Subtract the log of the sampling probability from the logits (logQ).")
    ssl_weight: float = Field(0.0, ge=0, description="Weight of the contrast of items, which is added to the loss.")
    ssl_items: int = Field(64, ge=2, description="Of the contrast: items of each position, uniform in the catalogue.")
    ssl_dropout: float = Field(0.2, ge=0, lt=1, description="Of the contrast: dropout that makes the views of a row.")
    ssl_temperature: float = Field(0.1, gt=0, description="Of the contrast: cosine similarities are divided by it.")


@register("task", "retrieval", options=RetrievalOptions)
class Retrieval(Task):
    """User and item vectors of length 1; cosine similarity over a temperature."""

    takes_context = True
    log_q: Tensor | None  # [C]

    @classmethod
    def needs_item_counts(cls, options: Any) -> bool:
        return bool(options.negatives == "popularity" or options.log_q)

    def __init__(self, config: Config, options: Any, facts: DataFacts, world: World = ALONE) -> None:
        super().__init__(config, options, facts, world)
        self.options: RetrievalOptions = options
        self.seed = config.train.seed
        self.backend = config.ops.sampled_softmax_loss
        check_backbone(config, candidates=False)
        self.encoder = SequenceEncoder(
            config.model,
            options_of(config, "model"),
            config.ops,
            num_items=facts.num_items,
            seed=config.train.seed,
            embedding=config.embedding,
            world=world,
        )
        self.tables = self.encoder.tables
        self.context_world = context_world(world, config.parallel.context)
        if self.context_world.size > 1 and not self.encoder.backbone.takes_context:
            raise ConfigError(f"parallel.context: model.backbone {config.model.backbone} cannot share sequences")
        if self.encoder.backbone.needs_times and not facts.has_times:
            raise ConfigError(
                f"data.name: {config.data.name} has no times, but model.backbone {config.model.backbone} uses a "
                "time bias; set model.options.bias to position"
            )
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
        dropout_keys = None
        if self.training:
            dropout_keys = random_key(self.seed, "dropout", prepared.epoch, *_tokens(batch, prepared.context))
        vectors = self.tables.lookup(prepared.plan)["items"]
        inputs, candidates = vectors.split([batch.tokens, draws["columns"].shape[0]])
        times = batch.times, batch.next_times
        hidden = self.encoder(batch.item_ids, batch.offsets, *times, dropout_keys, inputs, prepared.context)
        queries, rows = unit(hidden.float()), unit(candidates.float())
        log_q = None if self.log_q is None else self.log_q[draws["columns"]]
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
        return losses.sum(), losses.new_tensor(float(batch.tokens))

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
        negative = torch.einsum("td,trd->tr", queries, rows[negatives]) / self.options.temperature
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
        hidden = self.encoder(batch.item_ids, batch.offsets, batch.times, batch.next_times, None, vectors)
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

    def ranks(self, batch: JaggedBatch) -> Tensor:
        """Rank, from 1, of each held-out item, `[B]`; it stays in the ranking even where the history contains it."""
        targets = self.catalogue.column(batch.next_ids[batch.offsets[1:] - 1])
        return self.scorer.ranks(self._users(batch), targets, self._removed(batch))

    def observe(self, batch: JaggedBatch) -> Tensor:
        return self.ranks(batch)

    def metrics(self, observed: Tensor, names: list[str]) -> dict[str, float]:
        return compute_metrics(observed, names)

    def top_k(self, batch: JaggedBatch, k: int) -> tuple[Tensor, Tensor]:
        columns, scores = self.scorer.top_k(self._users(batch), k, self._removed(batch))
        return torch.where(scores.isfinite(), self.catalogue.items(columns), 0), scores

    def flops(self, lengths: Tensor) -> float:
        similarities = self.options.num_negatives + 1 + (0 if self.contrast is None else self.options.ssl_items)
        loss = 2.0 * self.encoder.items.spec.dim * similarities
        return self.encoder.flops(lengths) + loss * float(lengths.sum())


def _tokens(batch: JaggedBatch, context: ContextShard | None) -> tuple[Tensor, Tensor]:
    """Sequence id and position of every token, `[T]` each: what random draws are keyed by."""
    sequences = sequence_of_token(batch.offsets, batch.tokens)
    positions = position_of_token(batch.offsets, batch.tokens) if context is None else context.positions
    return batch.sequence_ids[sequences], positions


def _part_of(batch: JaggedBatch, context: ContextShard) -> JaggedBatch:
    """The tokens of a batch that are on this rank."""
    names = ("item_ids", "next_ids", "times", "next_times")
    given = {name: value for name in names if (value := getattr(batch, name)) is not None}
    return replace(batch, offsets=context.offsets, **{name: context.local(value) for name, value in given.items()})
