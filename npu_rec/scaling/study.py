"""A study: a grid of configurations that differ in a few keys."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from npu_rec.config import Config, Positive, Section, find_config, load_config, read_yaml, validate
from npu_rec.errors import ConfigError
from npu_rec.train.setup import load_run_config

ELSEWHERE = ("name", "data.source", "data.dir")
"""Keys that say where something is, not what a point measures."""


class EntropySettings(Section):
    """Approximate Entropy ApEn(m, r) of the Performance Law."""

    m: Positive = Field(2, description="Length of the windows compared.")
    r: float = Field(0.0, description="Largest difference of two ids that match; below 1 they must be equal.")
    last: Positive = Field(50, description="Items of each user, the most recent ones.")


class StudyConfig(Section):
    """The file of a study."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the study.")
    base: str = Field(description="Configuration of all points, from beside the study's file or `configs/...`.")
    set: dict[str, Any] = Field({}, description="Dotted key -> value, for all points.")
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        description="Every combination is a point. A dotted key -> list of values, or a name -> label -> mapping of "
        "dotted keys to values that are set together.",
        min_length=1,
    )
    threads: Positive = Field(1, description="CPU threads of a point; part of what makes its numbers.")
    targets: list[str] = Field(
        ["valid/loss", "test/hr@10", "test/ndcg@10"],
        min_length=1,
        description="What is fitted and drawn: `valid/` or `test/`, then `loss` or a metric.",
    )
    entropy: EntropySettings = Field(default_factory=EntropySettings, description="For the Performance Law.")


@dataclass(frozen=True)
class Point:
    """One configuration of a study.

    Attributes:
        name: of its run directory.
        settings: what the grid chose, name in the grid -> value or label.
        fingerprint: of everything that its numbers depend on, as stated in files; defaults do not count.
    """

    name: str
    settings: dict[str, Any]
    config: Config
    fingerprint: str


@dataclass(frozen=True)
class Study:
    """A study and its points, in the order of the grid."""

    config: StudyConfig
    path: Path
    points: list[Point]


def load_study(path: str | Path) -> Study:
    """Read a study and every configuration in it.

    Raises:
        ConfigError: the study or one of its points is not valid.
    """
    file = find_config(path)
    raw = read_yaml(file)
    if "grid" not in raw:
        raise ConfigError(
            f"{path}: not a scaling study (it has no `grid`); `npu-rec train {path}` runs a training configuration"
        )
    config = validate(StudyConfig, raw, {(): str(path)})
    beside = file.parent / config.base
    base = beside if beside.is_file() else find_config(config.base)
    axes = [_choices(name, values, path) for name, values in config.grid.items()]
    points = []
    for combination in itertools.product(*axes):
        settings = {name: shown for name, shown, _ in combination}
        keys = dict(config.set)
        for _, _, chosen in combination:
            keys |= chosen
        try:
            points.append(_point(base, settings, {**keys, "device.threads": config.threads}))
        except ConfigError as error:
            shown = ", ".join(f"{name} {value}" for name, value in settings.items())
            raise ConfigError(f"{path}: the point {shown}: {error}") from None
    _check_targets(config.targets, points, path)
    twice = [name for name, count in Counter(point.name for point in points).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: grid: two points have the name {twice[0]}")
    return Study(config, file, points)


def _choices(
    name: str, values: list[Any] | dict[str, dict[str, Any]], path: str | Path
) -> list[tuple[str, Any, dict[str, Any]]]:
    """Of one entry of the grid: name, value or label, keys that are set."""
    if not values:
        raise ConfigError(f"{path}: grid: {name} has no values")
    if isinstance(values, dict):
        return [(name, label, keys) for label, keys in values.items()]
    return [(name, value, {name: value}) for value in values]


def _point(base: Path, settings: dict[str, Any], keys: dict[str, Any]) -> Point:
    parts = [f"{name.rpartition('.')[2]}-{value}" for name, value in settings.items()]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-")
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    overrides.append(f"name={json.dumps(name)}")
    given_by = "`set` or `grid`"
    stated = load_config(base, overrides, given_by)
    return Point(name, settings, load_run_config(base, overrides, given_by), _fingerprint(stated))


def _check_targets(targets: list[str], points: list[Point], path: str | Path) -> None:
    """Raise ConfigError for a target that no point measures."""
    for target in targets:
        split, _, name = target.partition("/")
        metrics = {metric for point in points for metric in (*point.config.eval.metrics, "loss")}
        if split not in ("train", "valid", "test") or name.rpartition("/")[2] not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"{path}: targets: {target!r}: expected valid/ or test/ and one of {known}")


def _fingerprint(config: Config) -> str:
    stated = config.model_dump(mode="json", exclude_defaults=True)
    for key in ELSEWHERE:
        section, _, inner = key.partition(".")
        if inner:
            stated.get(section, {}).pop(inner, None)
        else:
            stated.pop(section, None)
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
