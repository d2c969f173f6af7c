"""The options of the retrieval task."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from npu_rec.config import Section, no_doubles, refuse_idle
from npu_rec.tasks.event_kinds import Reading
from npu_rec.tasks.negatives import Strategy


class RetrievalOptions(Section):
    """`task.options` of `retrieval`."""

    loss: Literal["sampled_softmax", "bce"] = Field(
        "sampled_softmax",
        description="`bce`: binary cross entropy of the positive and, averaged, of the negatives.",
    )
    temperature: float = Field(0.05, gt=0, description="Cosine similarities are divided by it.")
    negatives: Strategy = Field("uniform", description="Where negatives come from.")
    num_negatives: int = Field(128, ge=1, description="Negatives R of each position.")
    log_q: bool = Field(
        False,
        description="Subtract the log of the sampling probability from the logits (logQ); with `in_batch` that is the "
        "chance to be among the items of the batch.",
    )
    behaviours: Reading = Field(
        "ignored",
        description="The actions of events, as views and purchases: not read, a vector added to the item's token, or a "
        "token of their own behind it.",
    )
    target_actions: list[int] | None = Field(
        None, min_length=1, description="Events with one of these actions are predicted and held out; unset: all."
    )
    domain_feature: str | None = Field(
        None, description="Feature of items that says their domain; metrics are given for each domain too."
    )
    domains: Reading = Field("ignored", description="The domains of events' items, as `behaviours`.")
    ssl_weight: float = Field(0.0, ge=0, description="Weight of the contrast of items, which is added to the loss.")
    ssl_items: int = Field(64, ge=2, description="Of the contrast: items of each position, uniform in the catalogue.")
    ssl_dropout: float = Field(0.2, ge=0, lt=1, description="Of the contrast: dropout that makes the views of a row.")
    ssl_temperature: float = Field(0.1, gt=0, description="Of the contrast: cosine similarities are divided by it.")

    @model_validator(mode="after")
    def _consistent(self) -> RetrievalOptions:
        if self.domains != "ignored" and self.domain_feature is None:
            raise ValueError("domains needs domain_feature, the feature of items that says them")
        no_doubles("target_actions", self.target_actions or [])
        without = not self.ssl_weight and "ssl_weight is 0"
        refuse_idle(self, dict.fromkeys(("ssl_items", "ssl_dropout", "ssl_temperature"), without))
        return self

    @property
    def reads_actions(self) -> bool:
        """Whether batches need the actions of events."""
        return self.behaviours != "ignored" or self.target_actions is not None
