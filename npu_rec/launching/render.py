"""Renders the templates of launch/. An unknown name in one is an error; values are quoted by filters."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).resolve().parents[1] / "launch"


def render(template: str, **values: Any) -> str:
    """The text of a template of launch/."""
    return _environment().get_template(template).render(**values)


def shell_word(value: object) -> str:
    """`value` as one word of the shell."""
    text = str(value)
    return f"'{text}'" if text.startswith("=") and shlex.quote(text) == text else shlex.quote(text)


def comment_lines(text: str) -> str:
    """`text` as lines of a comment."""
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="# ")


def yaml_value(value: object) -> str:
    """`value` as YAML on one line."""
    return json.dumps(value, ensure_ascii=False)


def shell_command(groups: Sequence[Sequence[str]], indent: int) -> str:
    """Words of a command, a group a line, lines after the first indented."""
    return f" \\\n{' ' * indent}".join(shlex.join(group) for group in groups)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell and YAML, not HTML
    )
    environment.filters |= {"sh": shell_word, "command": shell_command, "comment": comment_lines, "yaml": yaml_value}
    return environment
