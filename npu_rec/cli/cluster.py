"""plan, launch, and train --simulate-ranks: training on many cards, before it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from npu_rec.cli.arguments import ConfigArgument, JsonOption, SetOption, load
from npu_rec.cli.output import emit
from npu_rec.errors import UserError


def simulate(config: Any, ranks: int, rank: int, as_json: bool) -> None:
    """What `train --simulate-ranks` does."""
    from npu_rec.planning import show, simulate_rank

    simulated, movements, communicators = simulate_rank(config, rank, ranks)
    document = {
        "simulated_ranks": ranks,
        "rank": rank,
        "memory": vars(simulated.memory),
        "communicators": communicators,
        "movements": [vars(movement) for movement in movements],
        "tokens": simulated.tokens,
        "flops": simulated.flops,
    }

    def display(console: Console) -> None:
        console.print(
            f"rank {rank} of {ranks:,}: {simulated.tokens:,} events and {simulated.flops:.3g} operations a step"
        )
        console.print(show.memory_table(simulated.memory, communicators))
        if movements:
            console.print(show.movements_table(movements))

    emit(as_json, document, display)


def plan(
    config: ConfigArgument,
    cards: Annotated[int | None, typer.Option(min=1, help="Cards in all; those of `cluster:` by default.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines that they are in.")] = None,
    memory: Annotated[str | None, typer.Option(help="Device memory of a card, such as 64GiB.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Events of every sequence; model.max_seq_len by default, the most there can be.")
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what each card of a cluster would hold and send, whether that fits, and what would make it fit."""
    from npu_rec.planning import as_document, facts_of, machines_of, make_plan, show

    loaded = load(config, set_)
    machines = machines_of(loaded, cards, nodes, memory)
    made = make_plan(
        loaded, facts_of(loaded), machines, length, tell=lambda line: print(line, file=sys.stderr, flush=True)
    )

    def display(console: Console) -> None:
        console.print(show.headline(made))
        console.print(show.memory_table(made.memory, made.communicators))
        console.print(show.tables_table(made.tables))
        if made.movements:
            console.print(show.movements_table(made.movements))
        console.print(show.verdict(made))
        if made.changes:
            console.print(show.changes_table(made))

    emit(as_json, as_document(made), display)


def launch(
    config: ConfigArgument,
    scheduler: Annotated[str, typer.Option(help="torchrun, slurm, volcano, ascendjob or modelarts.")],
    set_: SetOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run on the cluster; runs/<name> by default.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="Only `auto`: every start goes on from the newest checkpoint, if any.")
    ] = "auto",
    node_rank: Annotated[
        int | None, typer.Option(help="With torchrun: which of cluster.hosts this machine is, from 0.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written and run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start training on the machines of `cluster:`."""
    from npu_rec.config import load_config
    from npu_rec.launching import render_launch, submit

    if resume != "auto":
        raise UserError(f"--resume {resume}: restarts would go back to it; start a run of its own with train.init_from")
    load(config, set_)  # every name in it, as `train` checks them
    plan = render_launch(
        load_config(config, set_),
        config,
        scheduler=scheduler,
        overrides=set_ or [],
        run_dir=run_dir,
        node_rank=node_rank,
        as_json=as_json,
    )
    answer = None if dry_run else submit(plan)
    document = {
        "scheduler": scheduler,
        "files": {str(path): text for path, text in plan.files.items()},
        "commands": plan.commands,
        "answer": answer,
    }
    emit(as_json, document, lambda console: print(plan.shown() if answer is None else answer))
