"""data list, data prepare: data sets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from npu_rec.cli.arguments import JsonOption, SetOption, load
from npu_rec.cli.output import emit


def data_list(as_json: JsonOption = False) -> None:
    """List the data set recipes."""
    from npu_rec import data  # noqa: F401  registers the built-in recipes
    from npu_rec.registry import import_extensions, lookup, names

    import_extensions([])
    recipes = {name: lookup("data", name).target for name in names("data")}

    def show(console: Console) -> None:
        table = Table("name", "what", "terms")
        for name, recipe in recipes.items():
            table.add_row(name, recipe.description, recipe.terms)
        console.print(table)

    document = [{"name": n, "description": r.description, "terms": r.terms} for n, r in recipes.items()]
    emit(as_json, document, show)


def data_prepare(
    name: Annotated[str, typer.Argument(help="A recipe, or a configuration file whose `data:` section is used.")],
    source: Annotated[Path | None, typer.Option(help="File or folder with the publisher's files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where prepared data is kept.")] = None,
    refresh: Annotated[bool, typer.Option(help="Prepare again even when it has been done.")] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Obtain, verify and convert a data set."""
    from npu_rec.data import SequenceStore, prepare

    overrides = list(set_ or [])
    if source is not None:
        overrides.append(f"data.source={json.dumps(str(source))}")
    if out is not None:
        overrides.append(f"data.dir={json.dumps(str(out))}")
    if not name.endswith((".yaml", ".yml")):
        name, overrides = "configs/base.yaml", [f"data.name={json.dumps(name)}", *overrides]
    config = load(name, overrides)
    path = prepare(config.data, refresh=refresh, log=lambda line: print(line, file=sys.stderr))
    manifest = SequenceStore(path).manifest
    document = {"path": path, "manifest": manifest}

    def show(console: Console) -> None:
        for key, value in manifest["counts"].items():
            console.print(f"{key:>20} {value:,}" if isinstance(value, int) else f"{key:>20} {value}")
        console.print(f"prepared data  {path}")

    emit(as_json, document, show)
