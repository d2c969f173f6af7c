"""How files compose to a configuration.

`load_config` reads a file, follows `base:`, expands `${NAME}`, applies `--set` overrides and validates.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from npu_rec.config.schema import Config, Origins
from npu_rec.errors import ConfigError

PACKAGED_CONFIGS = Path(__file__).resolve().parents[1] / "configs"

Path_ = tuple[str, ...]
SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(path: str | Path, overrides: list[str] | None = None, given_by: str = "--set") -> Config:
    """Read, compose and validate a configuration.

    Args:
        path: YAML file; `configs/...` is also looked for among the configurations of the package.
        overrides: `a.b=value` strings, the value read as YAML.
        given_by: where the overrides come from, for errors.

    Raises:
        ConfigError: with file, key and, for an unknown key, the nearest valid one.
    """
    origins: Origins = {}
    return _finish(_read(find_config(path), origins, ()), overrides, origins, given_by)


def load_resolved(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read what `dump_config` wrote: whole as it is, so nothing in it is expanded again."""
    origins: Origins = {(): str(path)}
    return _finish(_parse(Path(path), str(path)), overrides, origins)


def _finish(raw: dict[str, Any], overrides: list[str] | None, origins: Origins, given_by: str = "--set") -> Config:
    for override in overrides or []:
        _merge(raw, _parse_override(override), origins, given_by, ())
    config = validate(Config, raw, origins)
    config._origins = origins
    return config


def find_config(path: str | Path, folder: Path = Path()) -> Path:
    """The file itself, seen from `folder`, or the one of that name shipped with the package."""
    path = Path(path)
    if (folder / path).is_file():
        return folder / path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    packaged = PACKAGED_CONFIGS.joinpath(*parts)
    if parts and packaged.is_file():
        return packaged
    known = sorted(str(Path("configs") / p.relative_to(PACKAGED_CONFIGS)) for p in PACKAGED_CONFIGS.rglob("*.yaml"))
    near = difflib.get_close_matches(str(path), known, n=3, cutoff=0.5) or ["configs/quickstart.yaml"]
    raise ConfigError(f"{path}: no such configuration file; of the {len(known)} shipped, nearest: {', '.join(near)}")


def validate(model: type[SectionT], raw: Any, origins: Origins, prefix: Path_ = ()) -> SectionT:
    """Validate `raw` with `model`; the first problem becomes a ConfigError naming file and key."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        location = [part for part in problem["loc"] if isinstance(part, str)]
        key = (*prefix, *location)
        where = f"{_origin(origins, key)}: {_dotted((*prefix, *problem['loc']))}" if key else _all_origins(origins)
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown key{_suggest(model, location, prefix)}") from None
        message = problem["msg"].removeprefix("Value error, ")
        given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
        if problem["type"] == "literal_error" and repr(str(problem["input"])) in message:
            given = f" (given: the number {problem['input']}; put it in quotes within quotes: \"'{problem['input']}'\")"
        raise ConfigError(f"{where}: {message}{given}") from None


def _suggest(model: type[BaseModel], location: list[str], prefix: Path_) -> str:
    """The nearest valid key for an unknown one: of that name elsewhere, in its own section, then everywhere."""
    section: Any = model
    for part in location[:-1]:
        section = _section_of(section.model_fields[part]) or section
    wrong, everywhere = location[-1], _all_keys(model)
    own = [name for name in section.model_fields if name.startswith(wrong)][:1]
    own = own or difflib.get_close_matches(wrong, list(section.model_fields), n=1, cutoff=0.5)
    other = difflib.get_close_matches(wrong, [key[-1] for key in everywhere], n=1, cutoff=0.6)
    keys = (
        [key for key in everywhere if key[-1] == wrong]
        or [(*location[:-1], name) for name in own]
        or [key for key in everywhere if key[-1] in other]
    )
    if keys:
        return f"; did you mean {' or '.join('`' + '.'.join((*prefix, *key)) + '`' for key in keys)}?"
    here = ".".join((*prefix, *location[:-1])) or "the top level"
    return f"; {here} has {', '.join(section.model_fields) or 'no keys'}"


def _all_keys(model: type[BaseModel]) -> list[Path_]:
    keys: list[Path_] = []
    for name, field in model.model_fields.items():
        keys.append((name,))
        inner = _section_of(field)
        if inner is not None:
            keys += [(name, *key) for key in _all_keys(inner)]
    return keys


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or a list of."""
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def _dotted(key: tuple[str | int, ...]) -> str:
    """`a.b[1].c`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _origin(origins: Origins, key: Path_) -> str:
    while key and key not in origins:
        key = key[:-1]
    return origins.get(key, "configuration")


def located(config: Config, key: str, message: str) -> ConfigError:
    """The error of a value that is valid by itself but wrong for what is asked; names the file it came from."""
    return ConfigError(f"{_origin(config.origins, tuple(key.split('.')))}: {key}: {message}")


def _all_origins(origins: Origins) -> str:
    """The file and, where there are any, the overrides: what keys that contradict each other may come from."""
    return _origin(origins, ()) + (" with --set" if "--set" in origins.values() else "")


def _read(path: Path, origins: Origins, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    if path in seen:
        raise ConfigError(f"{shown}: `base:` leads back to itself: {' -> '.join(p.name for p in (*seen, path))}")
    own = _parse(path, shown)
    if "grid" in own:
        raise ConfigError(
            f"{shown}: a scaling study (it has a `grid`), not a training configuration; `npu-rec sweep {shown}` runs it"
        )
    base = _expand(own.pop("base", None), shown)
    merged: dict[str, Any] = {}
    if base is not None:
        parent = path.parent / str(base)
        try:
            parent = parent if parent.is_file() else find_config(str(base))
        except ConfigError as error:
            raise ConfigError(f"{shown}: base: {error}") from None
        merged = _read(parent, origins, (*seen, path))
    _merge(merged, _expand(own, shown), origins, shown, ())
    origins[()] = shown
    return merged


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text or a number", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(path: Path, shown: str) -> dict[str, Any]:
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{shown}{line}: not valid YAML: {problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: cannot be read: {error}") from None
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{shown}: expected a mapping of keys, found {type(own).__name__}")
    return own


def _merge(into: dict[str, Any], new: dict[Any, Any], origins: Origins, origin: str, prefix: Path_) -> None:
    for name, value in new.items():
        key = (*prefix, str(name))
        origins[key] = origin
        if isinstance(value, dict):
            below = into.get(str(name))
            into[str(name)] = below if isinstance(below, dict) else {}
            _merge(into[str(name)], value, origins, origin, key)
        elif value is None and isinstance(into.get(str(name)), dict):
            into[str(name)] = {}  # a section without a value: its keys have their defaults again
        else:
            into[str(name)] = value


def _expand(value: Any, shown: str) -> Any:
    if isinstance(value, dict):
        return {name: _expand(inner, shown) for name, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, shown) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"{shown}: environment variable {match[1]} is not set (used as {match[0]})")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", variable, value)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: expected key.subkey=value")
    try:
        parsed: Any = _expand(yaml.safe_load(value), "--set")
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that is no configuration by itself, with `${NAME}` replaced; a key given twice is an error."""
    expanded: dict[str, Any] = _expand(_parse(path, str(path)), str(path))
    return expanded
