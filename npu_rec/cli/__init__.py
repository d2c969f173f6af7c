"""The command line: parse, call one function, print. There is a file a group of commands.

What a command needs is imported inside it, so that `--help` is quick.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from npu_rec import __version__
from npu_rec.cli.cluster import launch, plan
from npu_rec.cli.data import data_list, data_prepare
from npu_rec.cli.hardware import bench, doctor, lower, selftest
from npu_rec.cli.scaling import sweep
from npu_rec.cli.training import convert, evaluate, recommend, train
from npu_rec.errors import TrainingError, UserError

app = typer.Typer(
    name="npu-rec",
    help="Large recommendation models on Ascend, CUDA and CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (train, evaluate, recommend, convert, bench, lower, selftest, sweep, plan, launch, doctor):
    app.command()(command)
data_app = typer.Typer(help="Data sets: list the recipes, prepare one.", no_args_is_help=True)
data_app.command("list")(data_list)
data_app.command("prepare")(data_prepare)
app.add_typer(data_app, name="data")


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: exit code 0 success, 2 bad usage, configuration or data, 1 failure; 130 for Ctrl-C is typer's."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    sys.path.insert(0, "")  # `imports:` finds modules of the current directory, as under `python -m npu_rec`
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingError as error:
        print(f"failed: {error}", file=sys.stderr)
        raise SystemExit(1) from None
