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
from npu_rec.registry import lookup, options_of
from npu_rec.tasks import Task
from npu_rec.train.setup import load_run_config

ELSEWHERE = ("name", "data.source", "data.dir")
"""Keys that say where something is, not what a point measures."""
LONGEST_NAME = 200
"""Letters of a point's name: it is a folder, also with a fingerprint behind it."""


class EntropySettings(Section):
    """Approximate Entropy ApEn(m, r) of the Performance Law."""

    m: Positive = Field(2, description="Length of the windows compared.")
    r: float = Field(0.0, ge=0, description="Largest difference of two ids that match; below 1 they must be equal.")
    last: Positive = Field(50, description="Items of each user, the most recent ones.")


class StudyConfig(Section):
    """The file of a study."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the study.")
    base: str = Field(description="Configuration of all points, from beside the study's file or `configs/...`.")
    set: dict[str, Any] = Field({}, description="Dotted key -> value, for all points.")
    grid: dict[str, Any] = Field(
        description="Every combination is a point. A dotted key -> list of values, or a name -> label -> mapping of "
        "dotted keys to values that are set together.",
        min_length=1,
    )
    threads: Positive = Field(1, description="CPU threads of a point; part of what makes its numbers.")
    targets: list[str] = Field(
        ["valid/loss", "test/hr@10", "test/ndcg@10"],
        min_length=1,
        description="What is fitted and drawn: `valid/` or `test/`, then `loss` or a metric; `train/loss`.",
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
    try:
        base = beside if beside.is_file() else find_config(config.base)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from None
    axes = [_choices(name, values, path) for name, values in config.grid.items()]
    _check_axes(axes, path)
    points = []
    for combination in itertools.product(*axes):
        settings = {name: shown for name, shown, _ in combination}
        keys = dict(config.set)
        for _, _, chosen in combination:
            keys |= chosen
        if "name" in keys:
            raise ConfigError(f"{path}: name: points have the names of what the grid chooses")
        device = keys.get("device")
        if "device.threads" in keys or (isinstance(device, dict) and "threads" in device):
            raise ConfigError(f"{path}: device.threads: `threads` of the study says how many a point has")
        try:
            points.append(_point(base, settings, {**keys, "device.threads": config.threads}))
        except ConfigError as error:
            shown = ", ".join(f"{name} {value}" for name, value in settings.items())
            raise ConfigError(f"{path}: the point {shown}: {error}") from None
    config = _check_targets(config, points, path)
    twice = [name for name, count in Counter(point.name for point in points).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{path}: grid: two points have the name {twice[0]}; values and labels must differ, in A-Z a-z 0-9 . _ -"
        )
    measures: dict[tuple[str, Path | None, Path | None], str] = {}
    for point in points:
        data = point.config.data
        other = measures.setdefault((point.fingerprint, data.source, data.dir), point.name)
        if other != point.name:
            raise ConfigError(f"{path}: grid: the points {other} and {point.name} are the same configuration")
    return Study(config, file, points)


Axis = list[tuple[str, Any, dict[str, Any]]]
"""Of one entry of the grid: name, value or label, keys that are set."""


def _choices(name: str, values: Any, path: str | Path) -> Axis:
    if not isinstance(values, list | dict):
        raise ConfigError(
            f"{path}: grid: {name}: expected a list of values, or labels with dotted keys under each (given: {values})"
        )
    if not values:
        raise ConfigError(f"{path}: grid: {name} has no values")
    if isinstance(values, list):
        return [(name, value, {name: value}) for value in values]
    for label, keys in values.items():
        if not isinstance(label, str):
            raise ConfigError(f"{path}: grid: {name}: a label is text: write {str(label)!r} with its quotes")
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{path}: grid: {name}: {label}: expected dotted keys with their values (given: {json.dumps(keys)})"
            )
    return [(name, label, keys) for label, keys in values.items()]


def _check_axes(axes: list[Axis], path: str | Path) -> None:
    """Raise ConfigError where one key is set by two entries of the grid."""
    by: dict[str, str] = {}
    for axis in axes:
        for key in {key for _, _, keys in axis for key in keys}:
            name = axis[0][0]
            if by.setdefault(key, name) != name:
                raise ConfigError(f"{path}: grid: {key} is set by both {by[key]} and {name}")


def _point(base: Path, settings: dict[str, Any], keys: dict[str, Any]) -> Point:
    parts = [f"{name.rpartition('.')[2]}-{value}" for name, value in settings.items()]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-")
    if len(name) > LONGEST_NAME:
        raise ConfigError(f"its name would have {len(name)} letters, at most {LONGEST_NAME} are possible")
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()]
    overrides.append(f"name={json.dumps(name)}")
    given_by = "`set` or `grid`"
    stated = load_config(base, overrides, given_by)
    config = load_run_config(base, overrides, given_by)
    shown = {key: _as_read(config, key, value) for key, value in settings.items()}
    return Point(name, shown, config, _fingerprint(stated))


def _as_read(config: Config, key: str, value: Any) -> Any:
    """The value of a dotted key as the configuration has it: YAML takes 1e-3 for text. A label stays."""
    found: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return value
        found = found[part]
    return found if isinstance(found, int | float | str) and not isinstance(value, dict) else value


def _check_targets(config: StudyConfig, points: list[Point], path: str | Path) -> StudyConfig:
    """The study with the targets that a point measures; of those that it states all must be.

    Raises:
        ConfigError: a stated target is measured by no point, or none of the default ones is.
    """
    known = sorted({name for point in points for name in _measured(point.config)})
    wrong = [target for target in config.targets if not any(_measures(point.config, target) for point in points)]
    if "targets" not in config.model_fields_set and wrong == config.targets:
        raise ConfigError(f"{path}: targets: they must be stated; the points measure {', '.join(known)}")
    if wrong and "targets" in config.model_fields_set:
        raise ConfigError(f"{path}: targets: {wrong[0]!r} is not among what the points measure: {', '.join(known)}")
    twice = [target for target, count in Counter(config.targets).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: targets: {twice[0]!r} stands there twice")
    return config.model_copy(update={"targets": [target for target in config.targets if target not in wrong]})


def _measures(config: Config, target: str) -> bool:
    """Whether a point of this configuration may measure a target; domains are known from the data alone."""
    split, _, name = target.partition("/")
    if f"{split}/{name.rpartition('/')[2]}" not in _measured(config):
        return False
    if name == "loss":
        return True
    chosen = config.eval.model_copy(update={"select": name})
    try:  # what may be selected is what is measured
        lookup("task", config.task.name).target.check(
            config.model_copy(update={"eval": chosen}), options_of(config, "task")
        )
    except ConfigError:
        return False
    return True


def _measured(config: Config) -> list[str]:
    """What a point of this configuration measures, domains and further targets of ranking left out."""
    task = lookup("task", config.task.name).target
    loss = [] if task.log_likelihood is Task.log_likelihood else ["loss"]
    splits = ["test"] if config.eval.protocol == "meta" else ["valid", "test"]
    return ["train/loss", *(f"{split}/{name}" for split in splits for name in (*loss, *config.eval.metrics))]


def _fingerprint(config: Config) -> str:
    stated = {"data": {}, **config.model_dump(mode="json", exclude_defaults=True)}
    for key in ELSEWHERE:
        section, _, inner = key.partition(".")
        if inner:
            stated.get(section, {}).pop(inner, None)
        else:
            stated.pop(section, None)
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
