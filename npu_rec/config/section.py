"""What sections of the configuration are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


def no_doubles(name: str, values: Sequence[object]) -> None:
    """Raise ValueError where a list of the configuration has a value twice."""
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"{name}: {twice[0]} is given twice")


def refuse_idle(section: BaseModel, idle: Mapping[str, str | bool]) -> None:
    """Raise ValueError for a key that has no effect and is not as by default.

    Args:
        idle: key -> why it has no effect, or something false where it has one.
    """
    for name, reason in idle.items():
        if reason and getattr(section, name) != type(section).model_fields[name].default:
            raise ValueError(f"{name} has no effect: {reason}")
