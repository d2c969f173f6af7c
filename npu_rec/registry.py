"""Named components: backbones, tasks, data recipes, metrics. Built-in and outside ones alike.

    @register("model", "my_model", options=MyOptions)
    class MyModel(Backbone): ...

A configuration's `imports: [my_package.my_module]`, or an entry point in the group `npu_rec`,
makes the registration happen before the name is looked up.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from npu_rec.config import Config, Section, validate
from npu_rec.errors import ConfigError

Kind = Literal["model", "task", "data", "metric", "prediction_metric"]
T = TypeVar("T")


class NoOptions(Section):
    """Schema of a component that takes no options."""


@dataclass(frozen=True)
class Entry:
    """A registered component and the pydantic schema of its options."""

    name: str
    target: Any
    options: type[BaseModel]


_entries: dict[Kind, dict[str, Entry]] = {"model": {}, "task": {}, "data": {}, "metric": {}, "prediction_metric": {}}


def register(kind: Kind, name: str, *, options: type[BaseModel] = NoOptions) -> Callable[[T], T]:
    """Decorator that registers a component under a name. A name can be taken once."""

    def decorate(target: T) -> T:
        known = _entries[kind].get(name)
        if known is not None and known.target is not target:
            raise ConfigError(f"{kind} {name!r} is registered twice: {known.target!r} and {target!r}")
        _entries[kind][name] = Entry(name, target, options)
        return target

    return decorate


def lookup(kind: Kind, name: str) -> Entry:
    """The component of that name.

    Raises:
        ConfigError: with the nearest name and the known ones.
    """
    entries = _entries[kind]
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name, list(entries), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    what = {"data": "data recipe", "model": "backbone", "prediction_metric": "metric"}.get(kind, kind)
    raise ConfigError(f"no {what} is registered as {name!r}{hint} (known: {', '.join(sorted(entries))})")


def names(kind: Kind) -> list[str]:
    """Registered names, sorted."""
    return sorted(_entries[kind])


def options_of(config: Config, kind: Literal["model", "task", "data"]) -> Any:
    """The validated options of the component a configuration names."""
    section = getattr(config, kind)
    entry = lookup(kind, section.backbone if kind == "model" else section.name)
    return validate(entry.options, section.options, config.origins, (kind, "options"))


def resolve(config: Config) -> Config:
    """Import what the configuration asks for, check every name and fill in the options' defaults."""
    import_extensions(config.imports)
    for kind in ("data", "model", "task"):
        getattr(config, kind).options = options_of(config, kind).model_dump(mode="json")
    lookup("model", config.model.backbone).target.check(config.model, options_of(config, "model"))
    lookup("task", config.task.name).target.check(config, options_of(config, "task"))
    return config


def import_extensions(modules: Iterable[str]) -> None:
    """Import the modules that register components, the package's own first.

    Raises:
        ConfigError: when a module cannot be imported, with the reason.
    """
    _import_entry_points()
    for module in modules:
        try:
            importlib.import_module(module)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"imports: {module}: cannot be imported: {type(error).__name__}: {error}") from error


@cache
def _import_entry_points() -> None:
    for point in entry_points(group="npu_rec"):
        try:
            point.load()
        except ConfigError:
            raise
        except Exception as error:
            package = f" of {point.dist.name}" if point.dist else ""
            raise ConfigError(
                f"entry point {point.name}{package}: {point.value} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
