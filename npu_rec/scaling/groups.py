"""Points that differ in the seed alone; in size and data alone; and what one setting does while the rest stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from npu_rec.scaling.results import Row, value_of

SEED = "train.seed"


@dataclass(frozen=True)
class Group:
    """Rows of the same settings but for the seed.

    Attributes:
        settings: name in the grid -> value or label, without the seed.
    """

    settings: dict[str, Any]
    rows: list[Row]

    @property
    def label(self) -> str:
        """The settings in words; the name of a setting stands only where its value is a number."""
        return words(self.settings.items())

    def values(self, target: str) -> list[float]:
        """Of each seed that measured the target."""
        return [value for row in self.rows if (value := value_of(row, target)) is not None]


def groups(rows: list[Row]) -> list[Group]:
    """In the order in which they occur."""
    found: dict[str, Group] = {}
    for row in rows:
        settings = {name: value for name, value in row["settings"].items() if name != SEED}
        found.setdefault(repr(settings), Group(settings, [])).rows.append(row)
    return list(found.values())


def variants(rows: list[Row]) -> list[int]:
    """For each row the number of its group: alike where the seed alone differs."""
    numbers = {id(row): number for number, group in enumerate(groups(rows)) for row in group.rows}
    return [numbers[id(row)] for row in rows]


def families(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows that a law may be fitted to together, by name: of one backbone, and alike in what is no size.

    A setting is no size where it takes two values with everything else the same, and neither parameters nor tokens
    differ: a learning rate, a variant of a layer.
    """
    found: dict[str, list[Row]] = {}
    other = {row["backbone"]: _no_sizes([r for r in rows if r["backbone"] == row["backbone"]]) for row in rows}
    for row in rows:
        own = [(name, row["settings"][name]) for name in other[row["backbone"]]]
        found.setdefault(words([("backbone", row["backbone"]), *own]), []).append(row)
    return found


def _no_sizes(rows: list[Row]) -> list[str]:
    names = {name: None for row in rows for name in row["settings"] if name != SEED}
    found = []
    for name in names:
        sizes: dict[str, dict[str, tuple[int, int]]] = {}
        for row in rows:
            rest = repr({key: value for key, value in row["settings"].items() if key != name})
            size = row["parameters"], row["tokens"]
            sizes.setdefault(rest, {})[repr(row["settings"].get(name))] = size
        if any(len(set(own.values())) < len(own) for own in sizes.values()):
            found.append(name)
    return found


def words(settings: Iterable[tuple[str, Any]]) -> str:
    """`hstu, num_blocks 4`."""
    return ", ".join(
        str(value) if isinstance(value, str) else f"{name.rpartition('.')[2]} {value}" for name, value in settings
    )


def curves(rows: list[Row], setting: str) -> dict[str, list[Group]]:
    """What else is the same, in words -> its groups by rising value of the setting."""
    found: dict[str, list[Group]] = {}
    for group in groups(rows):
        label = words((name, value) for name, value in group.settings.items() if name != setting)
        found.setdefault(label, []).append(group)
    return {label: sorted(own, key=lambda group: float(group.settings[setting])) for label, own in found.items()}


def numeric_settings(rows: list[Row]) -> list[str]:
    """Settings that take three numbers or more, apart from the seed."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row["settings"].items():
            values.setdefault(name, []).append(value)
    return [
        name
        for name, own in values.items()
        if name != SEED and all(type(value) in (int, float) for value in own) and len(set(own)) >= 3
    ]
