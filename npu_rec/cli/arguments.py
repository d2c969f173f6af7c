"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.epochs=5. Repeatable."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; everything else goes to stderr.")
]


def load(config: str, overrides: list[str] | None) -> Any:
    """The configuration of a run, every name in it checked."""
    from npu_rec.train import load_run_config

    return load_run_config(config, overrides)
