"""Retrieval: predict the next item, rank the whole catalogue (HSTU, arXiv 2402.17152, section 4.1.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad, softplus

from npu_rec.config import Config, Section
from npu_rec.data.batch import JaggedBatch
from npu_rec.errors import ConfigError
from npu_rec.evaluation.ranking import compute_metrics, ranks_of
from npu_rec.models.encoder import SequenceEncoder, unit
from npu_rec.ops import sampled_softmax_loss
from npu_rec.ops.jagged import offsets_to_lengths, sequence_of_token
from npu_rec.ops.random import random_key
from npu_rec.registry import options_of, register
from npu_rec.tasks.negatives import NegativeSampler, Strategy
from npu_rec.tasks.task import DataFacts, Task


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


@register("task", "retrieval", options=RetrievalOptions)
class Retrieval(Task):
    """User and item vectors of length 1; cosine similarity over a temperature."""

    catalogue: Tensor  # [C] item ids, ascending
    column_of_item: Tensor  # [num_items + 1] place in the catalogue, -1 outside it
    log_q: Tensor | None  # [C]

    def __init__(self, config: Config, options: Any, facts: DataFacts) -> None:
        super().__init__(config, options, facts)
        self.options: RetrievalOptions = options
        self.seed = config.train.seed
        self.backend = config.ops.sampled_softmax_loss
        self.encoder = SequenceEncoder(
            config.model, options_of(config, "model"), config.ops, num_items=facts.num_items, seed=config.train.seed
        )
        if self.encoder.backbone.needs_times and not facts.has_times:
            raise ConfigError(
                f"data.name: {config.data.name} has no times, but model.backbone {config.model.backbone} uses a "
                "time bias; set model.options.bias to position"
            )
        column = torch.full((facts.num_items + 1,), -1, dtype=torch.int64)
        column[facts.catalogue] = torch.arange(facts.catalogue.shape[0])
        self.register_buffer("catalogue", facts.catalogue, persistent=False)
        self.register_buffer("column_of_item", column, persistent=False)
        self.sampler = NegativeSampler(options.negatives, facts.item_counts[facts.catalogue])
        log_q = self.sampler.log_q() if options.log_q else None
        self.register_buffer("log_q", log_q, persistent=False)

    def loss(self, batch: JaggedBatch, epoch: int) -> tuple[Tensor, Tensor]:
        sequences = sequence_of_token(batch.offsets, batch.tokens)
        positions = torch.arange(batch.tokens, device=batch.offsets.device) - batch.offsets[sequences]
        sequence_ids = batch.sequence_ids[sequences]
        dropout_keys = random_key(self.seed, "dropout", epoch, sequence_ids, positions) if self.training else None
        negative_keys = random_key(self.seed, "negatives", epoch, sequence_ids, positions)

        positives = self.column_of_item[batch.next_ids]
        negatives = self.sampler.draw(negative_keys, self.options.num_negatives, positives)
        columns, positives, negatives = self._in_play(positives, negatives)
        # one lookup for inputs and candidates: a row is updated once a step
        vectors = self.encoder.items(torch.cat([batch.item_ids, self.catalogue[columns]]))
        inputs, candidates = vectors.split([batch.tokens, columns.shape[0]])
        hidden = self.encoder(batch.item_ids, batch.offsets, batch.times, batch.next_times, dropout_keys, inputs)
        queries, rows = unit(hidden.float()), unit(candidates.float())
        log_q = None if self.log_q is None else self.log_q[columns]
        if self.options.loss == "bce":
            losses = self._bce(queries, rows, positives, negatives, log_q)
        else:
            losses = sampled_softmax_loss(
                queries,
                rows,
                positives,
                negatives,
                temperature=self.options.temperature,
                log_q=log_q,
                backend=self.backend,
            )
        return losses.sum(), losses.new_tensor(float(batch.tokens))

    def _in_play(self, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Columns whose vectors are needed, and positives and negatives as indices into them.

        With as many draws as items nearly all are needed: then the whole catalogue is taken.
        """
        if negatives.numel() >= self.catalogue.shape[0]:
            return torch.arange(self.catalogue.shape[0], device=positives.device), positives, negatives
        columns, index = torch.unique(torch.cat([positives.unsqueeze(1), negatives], 1), return_inverse=True)
        return columns, index[:, 0].contiguous(), index[:, 1:].contiguous()

    def _bce(self, queries: Tensor, rows: Tensor, positives: Tensor, negatives: Tensor, log_q: Tensor | None) -> Tensor:
        positive = (queries * rows[positives]).sum(1) / self.options.temperature
        negative = torch.einsum("td,trd->tr", queries, rows[negatives]) / self.options.temperature
        if log_q is not None:
            positive, negative = positive - log_q[positives], negative - log_q[negatives]
        counted = negatives != positives.unsqueeze(1)
        of_negatives = (softplus(negative) * counted).sum(1) / counted.sum(1).clamp_min(1)
        return softplus(-positive) + of_negatives

    def _scores(self, batch: JaggedBatch) -> tuple[Tensor, Tensor]:
        """Cosine similarities `[B, C]` of the user vectors, and which (user, column) pairs are taken out."""
        hidden = self.encoder(batch.item_ids, batch.offsets, batch.times, batch.next_times)
        users = hidden.new_zeros(batch.sequence_ids.shape[0], hidden.shape[1])
        some = offsets_to_lengths(batch.offsets) > 0
        users[some] = hidden[batch.offsets[1:][some] - 1]
        with torch.autocast(users.device.type, enabled=False):  # in bfloat16 near items would tie
            scores = unit(users.float()) @ unit(self.encoder.items.weight[self.catalogue].float()).T
        removed = torch.zeros_like(scores, dtype=torch.bool)
        if batch.removed is not None and batch.removed_offsets is not None:
            columns = self.column_of_item[batch.removed]
            rows = sequence_of_token(batch.removed_offsets, columns.shape[0])
            removed[rows[columns >= 0], columns[columns >= 0]] = True
        return scores, removed

    def ranks(self, batch: JaggedBatch) -> Tensor:
        """Rank, from 1, of each held-out item, `[B]`; it stays in the ranking even where the history contains it."""
        scores, removed = self._scores(batch)
        targets = self.column_of_item[batch.next_ids[batch.offsets[1:] - 1]]
        return ranks_of(scores.masked_fill_(removed.scatter_(1, targets.unsqueeze(1), False), float("-inf")), targets)

    def evaluate(self, batches: Iterable[JaggedBatch], metrics: list[str]) -> dict[str, float]:
        ranks = [self.ranks(batch).cpu() for batch in batches]  # metrics are float64, which not every card has
        return compute_metrics(torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64), metrics)

    def top_k(self, batch: JaggedBatch, k: int) -> tuple[Tensor, Tensor]:
        scores, removed = self._scores(batch)
        best = scores.masked_fill_(removed, float("-inf")).topk(min(k, scores.shape[1]), dim=1)
        ids = torch.where(best.values.isfinite(), self.catalogue[best.indices], 0)
        beyond = (0, k - ids.shape[1])
        return pad(ids, beyond), pad(best.values, beyond, value=float("-inf"))

    def flops(self, lengths: Tensor) -> float:
        loss = 2.0 * self.encoder.items.weight.shape[1] * (self.options.num_negatives + 1)
        return self.encoder.backbone.flops(lengths) + loss * float(lengths.sum())
