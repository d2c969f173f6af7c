"""The options of the ranking task."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from npu_rec.config import Section, no_doubles, refuse_idle


class Target(Section):
    """One entry of `task.options.targets`."""

    name: str = Field("click", pattern=r"^[A-Za-z0-9_-]+$", description="Shown before its metrics, but for the first.")
    kind: Literal["binary", "regression"] = Field(
        "binary", description="Cross-entropy of a yes or no, or squared error of the action's number."
    )
    at_least: int | None = Field(None, description="Yes: the action is this number or more.")
    bits: int | None = Field(None, ge=1, description="Yes: the action has one of these bits.")
    scale: float = Field(1.0, gt=0, description="What a regression multiplies the action by.")
    weight: float = Field(1.0, gt=0, description="Of its loss.")

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        given = [name for name in ("at_least", "bits") if getattr(self, name) is not None]
        if self.kind == "binary" and len(given) != 1:
            raise ValueError("a binary target needs either at_least or bits")
        if self.kind == "regression" and given:
            raise ValueError(f"{given[0]} is for binary targets")
        if self.kind == "binary" and self.scale != 1.0:
            raise ValueError("scale is for regression targets")
        return self

    def labels(self, actions: Tensor) -> Tensor:
        """`actions [M]` int64 -> `[M]`: bool, or float32 for a regression."""
        if self.kind == "regression":
            return actions.float() * self.scale
        return actions >= self.at_least if self.at_least is not None else (actions & (self.bits or 0)) != 0


class RankingOptions(Section):
    """`task.options` of `ranking`."""

    targets: list[Target] = Field(
        [Target(at_least=1)], min_length=1, description="What is predicted; the first gives metrics their plain names."
    )
    unknown_action: int | None = Field(
        None, description="The action of events that have no label: they are read, and not predicted."
    )
    layout: Literal["interleaved", "merged"] = Field(
        "interleaved",
        description="`interleaved`: item, action, item, action, ...; every labelled event of a window is predicted at "
        "its item. `merged`: item and action are one token, candidates stand behind the history.",
    )
    candidates: int = Field(
        4, ge=1, description="With `merged`: so many labelled events in a row are trained behind one history."
    )
    actions: Literal["value", "bits"] = Field(
        "value", description="A vector for each action, or one for each bit of it."
    )
    head: Literal["dot", "mlp", "ffn"] = Field(
        "mlp", description="Product of state and item; layers on their elementwise product, or on both side by side."
    )
    head_hidden: list[int] = Field([128], description="Widths of the layers of `mlp` and `ffn`.")
    negative_ratio: float = Field(
        1.0, gt=0, le=1, description="Share of the labelled events that are positive for no binary target which train."
    )
    item_features: list[str] = Field([], description="Features of items, added to their vectors (side information).")
    item_pooling: Literal["mean", "project"] = Field(
        "mean", description="Mean of the item's vector and those of its features, or a linear map of all."
    )
    user_features: list[str] = Field(
        [],
        description="Features of users: each is a token before the history. With `merged` it sees all of the history.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RankingOptions:
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise ValueError("targets need different names")
        if any(width < 1 for width in self.head_hidden):
            raise ValueError("head_hidden: a width is 1 or more")
        for name in ("item_features", "user_features"):
            no_doubles(name, getattr(self, name))
        regressions = all(target.kind == "regression" for target in self.targets)
        idle = {
            "negative_ratio": regressions and "it is for binary targets",
            "head_hidden": self.head == "dot" and "head dot has no layers",
            "candidates": self.layout == "interleaved" and "layout interleaved predicts every event of a window",
            "item_pooling": not self.item_features and "there are no item_features",
        }
        refuse_idle(self, idle)
        return self
