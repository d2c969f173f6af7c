"""sweep: scaling studies."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from npu_rec.cli.arguments import JsonOption
from npu_rec.cli.output import emit
from npu_rec.errors import TrainingError, UserError


def sweep(
    config: Annotated[str, typer.Argument(metavar="STUDY", help="YAML file, such as configs/scaling/quick.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the study; runs/sweeps/<name> by default.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the points' run directories; that of the study by default.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Points at once; by default as many as the cores have threads for.")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing: draw what there is.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every point of a scaling study, fit scaling laws, and write table, plots and report."""
    from npu_rec.scaling import (
        failed_rows,
        finished_rows,
        load_study,
        points_table,
        read_results,
        run_sweep,
        write_report,
    )

    study = load_study(config)
    folder = out if out is not None else Path("runs") / "sweeps" / study.config.name
    if report_only and not folder.is_dir():
        raise UserError(f"{folder} holds no study; leave out --report-only to train it")
    failed = []
    if not report_only:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the points end as well
        failed = run_sweep(
            study, folder, runs=run_dir, workers=workers, tell=lambda line: print(line, file=sys.stderr, flush=True)
        )
    results = read_results(folder / "results.jsonl")
    rows = finished_rows(study, results)
    if report_only and not rows:
        raise UserError(f"{folder}: no point of the study is finished, as it is configured now; nothing was drawn")
    folder.mkdir(parents=True, exist_ok=True)
    report = write_report(study, rows, folder, failed_rows(study, results))
    document = {
        "out": folder,
        "points": len(study.points),
        "finished": len(rows),
        "failed": failed,
        "rows": rows,
        **report.as_document(),
    }

    def show(console: Console) -> None:
        heads, cells = points_table(rows, study.config.targets)
        table = Table()
        for number, head in enumerate(heads):
            table.add_column(head, no_wrap=number == 0)
        for row in cells:
            table.add_row(*row)
        console.print(table)
        console.print(f"{len(rows)} of {len(study.points)} points are finished\nreport  {report.path}")

    emit(as_json, document, show)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(study.points)} points failed: {failed[0]['point']}: {failed[0]['reason']}"
        )
