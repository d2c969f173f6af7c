"""Ranking: predict the action at a candidate, several targets at once (HSTU, arXiv 2402.17152, section 2.2)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from npu_rec.config import Config
from npu_rec.data import SequenceStore
from npu_rec.data.batch import LabelledBatch
from npu_rec.data.features import Wanted
from npu_rec.data.labelled import split_by_time
from npu_rec.data.splits import Split
from npu_rec.distributed import World
from npu_rec.distributed.world import ALONE
from npu_rec.errors import ConfigError
from npu_rec.evaluation.predictions import BINARY, LOWER_IS_BETTER, REGRESSION, prediction_metric
from npu_rec.models.actions import ActionEncoder
from npu_rec.models.features import FeatureTable, SideInformation
from npu_rec.models.heads import Head
from npu_rec.ops.random import random_key
from npu_rec.registry import lookup, register
from npu_rec.tasks.arrangement import arrange
from npu_rec.tasks.ranking_options import RankingOptions, Target
from npu_rec.tasks.task import DataFacts, Prepared, Task, build_encoder, check_actions, check_backbone


@register("task", "ranking", options=RankingOptions)
class Ranking(Task):
    """Candidates in the sequence: each sees the history before it and itself, and a head predicts its action."""

    def __init__(self, config: Config, options: Any, facts: DataFacts, world: World = ALONE) -> None:
        super().__init__(config, options, facts, world)
        self.options: RankingOptions = options
        self.seed = config.train.seed
        self.interleaved = options.layout == "interleaved"
        if facts.num_actions == 0:
            raise ConfigError(f"data.name: {config.data.name} has no actions, which task.name ranking predicts")
        tokens = config.model.max_seq_len * (2 if self.interleaved else 1) + len(facts.features.users)
        self.encoder = build_encoder(config, facts, world, max_seq_len=tokens)
        self.tables = self.encoder.tables
        width, rows = config.model.embedding_dim, self.encoder.items.spec.dim
        self.actions = ActionEncoder(options.actions, facts.num_actions, width, hides=not self.interleaved)
        self.side = SideInformation(facts.features.items, options.item_pooling, rows)
        self.contextual = torch.nn.ModuleDict(
            {name: FeatureTable(codes, width) for name, codes in facts.features.users.items()}
        )
        self.head = Head(options.head, rows, options.head_hidden, len(options.targets))

    # --- what the task asks of the data

    @classmethod
    def needs_item_counts(cls, options: Any) -> bool:
        return False

    @classmethod
    def plannable(cls, options: Any) -> bool:
        return False  # the data says which events are labelled

    @classmethod
    def wanted_features(cls, options: Any) -> Wanted:
        return Wanted(options.item_features, options.user_features)

    @classmethod
    def make_splits(cls, store: SequenceStore, config: Config, options: Any) -> dict[str, Split]:
        if options.actions == "value":
            check_actions(store, "task.options.actions: value", "bits has one for each bit")
        return split_by_time(
            store,
            test_share=config.eval.test_share,
            valid_share=config.eval.valid_share,
            unknown=options.unknown_action,
            max_seq_len=config.model.max_seq_len,
            candidates=0 if options.layout == "interleaved" else options.candidates,
            positive=partial(_positive, options.targets),
            negative_ratio=options.negative_ratio,
            seed=config.train.seed,
        )

    @classmethod
    def check(cls, config: Config, options: Any) -> None:
        merged, most = options.layout == "merged", config.model.max_output_len
        check_backbone(config, candidates=merged)
        if merged and options.candidates > most:
            raise ConfigError(
                f"task.options.candidates: {options.candidates} do not fit in the {most} places of model.max_output_len"
            )
        if config.eval.protocol != "time":
            raise ConfigError(f"eval.protocol: task.name ranking needs time, not {config.eval.protocol}")
        if config.train.stochastic_length is not None:
            raise ConfigError("train.stochastic_length: task.name ranking reads whole histories")
        for name in config.eval.metrics:
            lookup("prediction_metric", name)
        measured = [shown for _, _, shown in _measured(options.targets, config.eval.metrics)]
        if config.eval.select not in measured:
            raise ConfigError(
                f"eval.select: {config.eval.select!r} is not among what eval.metrics gives for task.options.targets: "
                f"{', '.join(measured) or 'nothing'}"
            )

    @classmethod
    def lower_is_better(cls, metric: str) -> bool:
        return metric.rpartition("/")[2] in LOWER_IS_BETTER

    # --- training

    def prepare(self, batch: LabelledBatch, epoch: int) -> Prepared:
        return Prepared(batch, epoch, {}, self.tables.plan({"items": batch.item_ids}))

    def loss(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        batch: LabelledBatch = prepared.batch
        vectors = self.tables.lookup(prepared.plan)["items"]
        logits = self._logits(batch, vectors, batch.labelled, prepared.epoch if self.training else None)
        actions = batch.actions[batch.labelled]
        losses = logits.new_zeros(())
        for i, target in enumerate(self.options.targets):
            labels, scores = target.labels(actions).to(logits.dtype), logits[:, i]
            # log(1 + e^s) - s y is the cross-entropy of the logit s
            each = softplus(scores) - scores * labels if target.kind == "binary" else (scores - labels).square()
            losses = losses + target.weight * each.sum()
        return losses, losses.new_tensor(float(actions.shape[0]))

    def _logits(self, batch: LabelledBatch, vectors: Tensor, chosen: Tensor, epoch: int | None) -> Tensor:
        """`[M, targets]` of the chosen `[T]` events, in float32 at least.

        Args:
            vectors: `[T, E]`, the rows of the items.
            epoch: of the dropout; None: there is none.
        """
        vectors = self.side(batch.item_ids, vectors)
        arranged = arrange(
            batch,
            items=self.encoder.inputs(vectors),
            actions=self.actions,
            contextual=[table(batch.sequence_ids) for table in self.contextual.values()],
            interleaved=self.interleaved,
            max_seq_len=self.encoder.max_seq_len,
            keys=None if epoch is None else lambda rows, places: random_key(self.seed, "dropout", epoch, rows, places),
        )
        x, layout = arranged.tokens, arranged.layout
        states = self.encoder.through(x, layout, torch.ones_like(x[:, 0], dtype=torch.bool))
        places = arranged.places[chosen]
        logits: Tensor = self.head(states[places], vectors[chosen])
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    # --- evaluation

    def observe(self, batch: LabelledBatch) -> Tensor:
        """`[B, 2 + 2 targets]` float64 of rows with one candidate: user, item, scores, labels."""
        vectors = self.tables.read("items", batch.item_ids)
        last = torch.zeros_like(batch.labelled)
        last[batch.offsets[1:] - 1] = True
        scores = self._logits(batch, vectors, last, None).cpu().double()
        actions = batch.actions[last].cpu()
        labels = [target.labels(actions).double() for target in self.options.targets]
        about = torch.stack([batch.sequence_ids, batch.item_ids[last]], 1).cpu().double()
        return torch.cat([about, scores, torch.stack(labels, 1)], 1)

    def metrics(self, observed: Tensor, names: list[str]) -> dict[str, float]:
        """`auc` and so on of the first target, `<name>/auc` of the others; of each those that fit its kind."""
        count, users = len(self.options.targets), observed[:, 0].to(torch.int64)
        return {
            shown: prediction_metric(name, observed[:, 2 + i], observed[:, 2 + count + i], users)
            for i, name, shown in _measured(self.options.targets, names)
        }

    def predictions(self, observed: Tensor) -> dict[str, Tensor]:
        """`item_id`, and of each target `<name>/score`, a logit for a binary one, and `<name>/label`."""
        count = len(self.options.targets)
        columns = {"item_id": observed[:, 1].to(torch.int64)}
        for i, target in enumerate(self.options.targets):
            columns[f"{target.name}/score"] = observed[:, 2 + i]
            columns[f"{target.name}/label"] = observed[:, 2 + count + i]
        return columns

    def flops(self, lengths: Tensor) -> float:
        tokens = lengths * (2 if self.interleaved else 1) + len(self.contextual)
        rows = float(lengths.sum()) if self.interleaved else float(lengths.numel())
        return self.encoder.flops(tokens) + self.head.flops(rows)


def _positive(targets: list[Target], actions: np.ndarray) -> np.ndarray:
    """`[E]` bool: which actions are positive for a binary target; all, where there is none."""
    binary = [target.labels(torch.from_numpy(actions)) for target in targets if target.kind == "binary"]
    return torch.stack(binary).any(0).numpy() if binary else np.ones(len(actions), bool)


def _measured(targets: list[Target], names: list[str]) -> list[tuple[int, str, str]]:
    """Target, metric and the name shown, where the metric is for the kind of target; a user's own is for all."""
    return [
        (i, name, name if i == 0 else f"{target.name}/{name}")
        for i, target in enumerate(targets)
        for name in names
        if name not in (REGRESSION if target.kind == "binary" else BINARY)
    ]
