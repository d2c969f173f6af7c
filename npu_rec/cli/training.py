"""train, evaluate, recommend, convert: a model from its data to its answers."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from npu_rec.cli.arguments import ConfigArgument, JsonOption, SetOption, load
from npu_rec.cli.cluster import simulate
from npu_rec.cli.output import emit, metrics_table
from npu_rec.errors import UserError


def train(
    config: ConfigArgument,
    set_: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(help="`auto`: the newest checkpoint of the run directory, if any; or a checkpoint's path."),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name> by default.")] = None,
    simulate_ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Train nothing: build one of so many ranks, without values, and say what it needs."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Which of those, from 0; 0 by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model and test it."""
    if simulate_ranks is not None:
        if run_dir is not None or resume is not None:
            raise UserError("--simulate-ranks trains nothing: leave out --run-dir and --resume")
        simulate(load(config, set_), simulate_ranks, rank or 0, as_json)
        return
    if rank is not None:
        raise UserError("--rank is for --simulate-ranks; torchrun numbers the ranks of a training")
    from npu_rec.train import train as run_training

    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("npu_rec").setLevel(logging.INFO)  # which backends run

    result = run_training(load(config, set_), run_dir=run_dir, resume=resume)
    if not result.is_first:
        return
    document = {
        "run_dir": result.run_dir,
        "checkpoint": result.checkpoint,
        "report": result.report,
        "metrics": result.metrics,
        "seconds": round(result.seconds, 3),
        "resumed_from_step": result.resumed_from_step,
        **result.extra,
    }

    def show(console: Console) -> None:
        console.print(metrics_table(result.metrics))
        console.print(f"training took {result.extra['train_seconds']:.1f} s")
        console.print(
            f"run directory  {result.run_dir}\nreport         {result.report}\ncheckpoint     {result.checkpoint}"
        )

    emit(as_json, document, show)


def evaluate(
    config: ConfigArgument,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, such as runs/NAME/checkpoints/step-480.")],
    ranks: Annotated[
        Path | None,
        typer.Option(help="CSV file to write, of retrieval: split, user, rank of the held-out item (from 1)."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="CSV file to write, of ranking: split, user, item, score and label of every target."),
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a checkpoint on the held-out events."""
    from npu_rec.train.evaluate import evaluate as run_evaluation

    result = run_evaluation(load(config, set_), checkpoint, ranks=ranks, predictions=predictions)
    if not result.is_first:
        return
    document = {
        "run_dir": checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None,
        "checkpoint": result.checkpoint,
        "metrics": result.metrics,
        "seconds": round(result.seconds, 3),
        "resumed_from_step": None,
    }
    emit(as_json, document, lambda console: console.print(metrics_table(result.metrics)))


def recommend(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    history: Annotated[
        str | None,
        typer.Option(help="ID[@TIME],ID[@TIME],... with the data set's own ids, oldest first, times in seconds."),
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(help="File with a history a line: USER<TAB>ID[@TIME],...[<TAB>REQUEST_TIME], or JSON lines."),
    ] = None,
    at: Annotated[
        int | None, typer.Option(max=10**17, help="Time of the request in seconds; the last event's by default.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    device: Annotated[str | None, typer.Option(help="auto, ascend, cuda or cpu; as trained by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Recommend items after a history."""
    from npu_rec.serving import Recommender, parse_history, read_users

    if (history is None) == (users is None):
        raise UserError("give either --history or --users")
    histories = [parse_history(history)] if history is not None else read_users(users) if users is not None else []
    answers = Recommender(checkpoint, device).recommend(histories, top_k, at)

    def show(console: Console) -> None:
        for answer in answers:
            table = Table("rank", "id", "score", "title", title=None if answer.user == "-" else f"user {answer.user}")
            for rank, item in enumerate(answer.items, 1):
                table.add_row(str(rank), str(item["id"]), f"{item['score']:.4f}", str(item.get("title", "")))
            console.print(table)

    emit(as_json, [{"user": answer.user, "items": answer.items} for answer in answers], show)


def convert(
    source: Annotated[
        Path, typer.Argument(help="Checkpoint folder, .safetensors file, or Meta's research checkpoint (.pt).")
    ],
    target: Annotated[Path, typer.Argument(help="Folder for a checkpoint, *.safetensors, or *.pt under Meta's names.")],
    config: Annotated[str, typer.Option(help="Configuration with the model's shape and the data set.")],
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert weights between npu-rec, safetensors and Meta's research checkpoints."""
    from npu_rec.train.convert import convert as run_conversion

    written = run_conversion(source, target, load(config, set_))
    emit(as_json, {"source": source, "target": written}, lambda console: console.print(f"wrote {written}"))
