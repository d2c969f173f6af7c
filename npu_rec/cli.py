"""The command line: parse, call one function, print."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from npu_rec import __version__
from npu_rec.errors import TrainingError, UserError

app = typer.Typer(
    name="npu-rec",
    help="Large recommendation models on Ascend, CUDA and CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Data sets: list the recipes, prepare one.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.epochs=5. Repeatable."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; everything else goes to stderr.")
]


def main() -> None:
    """Entry point: exit code 0 success, 2 bad usage, configuration or data, 1 failure."""
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None


def _emit(as_json: bool, document: Any, show: Callable[[Console], None]) -> None:
    """One JSON document, or what `show` prints."""
    if as_json:
        print(json.dumps(document, indent=1, default=str))
    else:
        console = Console(highlight=False, soft_wrap=True)
        if not console.is_terminal:
            console.width = 140  # a file or a pipe has no width of its own
        show(console)


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


@app.command()
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
        _simulate(_load(config, set_), simulate_ranks, rank or 0, as_json)
        return
    if rank is not None:
        raise UserError("--rank is for --simulate-ranks; torchrun numbers the ranks of a training")
    from npu_rec.train import train as run_training

    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("npu_rec").setLevel(logging.INFO)  # which backends run

    result = run_training(_load(config, set_), run_dir=run_dir, resume=resume)
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
        console.print(_metrics_table(result.metrics))
        console.print(f"training took {result.extra['train_seconds']:.1f} s")
        console.print(
            f"run directory  {result.run_dir}\nreport         {result.report}\ncheckpoint     {result.checkpoint}"
        )

    _emit(as_json, document, show)


def _simulate(config: Any, ranks: int, rank: int, as_json: bool) -> None:
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

    _emit(as_json, document, display)


@app.command()
def evaluate(
    config: ConfigArgument,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, such as runs/NAME/checkpoints/step-480.")],
    ranks: Annotated[
        Path | None, typer.Option(help="CSV file to write: split, user, rank of the held-out item (from 1).")
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a checkpoint on the held-out events."""
    from npu_rec.train.evaluate import evaluate as run_evaluation

    result = run_evaluation(_load(config, set_), checkpoint, ranks=ranks)
    if not result.is_first:
        return
    document = {
        "run_dir": checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None,
        "checkpoint": result.checkpoint,
        "metrics": result.metrics,
        "seconds": round(result.seconds, 3),
        "resumed_from_step": None,
    }
    _emit(as_json, document, lambda console: console.print(_metrics_table(result.metrics)))


@app.command()
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

    _emit(as_json, [{"user": answer.user, "items": answer.items} for answer in answers], show)


@app.command()
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

    written = run_conversion(source, target, _load(config, set_))
    _emit(as_json, {"source": source, "target": written}, lambda console: console.print(f"wrote {written}"))


@data_app.command("list")
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
    _emit(as_json, document, show)


@data_app.command("prepare")
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
    config = _load(name, overrides)
    path = prepare(config.data, refresh=refresh, log=lambda line: print(line, file=sys.stderr))
    manifest = SequenceStore(path).manifest
    document = {"path": path, "manifest": manifest}

    def show(console: Console) -> None:
        for key, value in manifest["counts"].items():
            console.print(f"{key:>20} {value:,}" if isinstance(value, int) else f"{key:>20} {value}")
        console.print(f"prepared data  {path}")

    _emit(as_json, document, show)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="attention, loss, embedding, norm-gate, train-step or balance.")],
    device: Annotated[str, typer.Option(help="auto, ascend, cuda or cpu.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=4096, help="CPU threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time operators against the plain PyTorch form in the same run."""
    from dataclasses import asdict

    from npu_rec.bench import SUITES, run_suite, table_of
    from npu_rec.device import get_device

    if name not in SUITES:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(SUITES)}")
    place = get_device(device)  # type: ignore[arg-type]
    place.set_threads(threads)
    rows = run_suite(name, place, repeats=repeats)

    _emit(
        as_json,
        {"device": place.name, "rows": [asdict(row) for row in rows]},
        lambda console: console.print(table_of(rows)),
    )


@app.command()
def lower(
    chip: Annotated[
        list[str] | None, typer.Option(help="Such as 910B1. Repeatable; by default one of each kind.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="Only kernels whose name, operator.kernel, begins so.")] = "",
    install: Annotated[
        bool, typer.Option("--install", help="First install the compilers, if they are absent.")
    ] = False,
    table: Annotated[Path | None, typer.Option(help="Also write a page of Markdown.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Lower the kernels for Ascend with Ascend's own compiler; no NPU is needed."""
    from dataclasses import asdict

    from npu_rec.bench import lowering

    if table is not None and (table.is_dir() or not table.absolute().parent.is_dir()):
        raise UserError(f"--table {table} is not a file in a folder that is there")
    chips = tuple(name if name.startswith("Ascend") else f"Ascend{name}" for name in chip or lowering.CHIPS)
    rows = lowering.lower(chips, kernel, install=install)
    _emit(as_json, {"rows": [asdict(row) for row in rows]}, lambda console: console.print(lowering.table_of_rows(rows)))
    if table is not None:
        try:
            table.write_text(lowering.markdown(rows), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--table {table} cannot be written: {error.strerror}") from None
    failed = sum(row.status != "lowered" for row in rows)
    if failed:
        raise TrainingError(f"{failed} of {len(rows)} kernels do not lower or do not fit")


@app.command()
def selftest(
    device: Annotated[str, typer.Option(help="auto, ascend, cuda or cpu.")] = "auto",
    out: Annotated[Path, typer.Option(help="The report file to write.")] = Path("npu-rec-selftest.md"),
    only: Annotated[
        list[str] | None, typer.Option(help="operators, training, collectives or speed. Repeatable; all by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this device against the CPU, and write a report to send."""
    from npu_rec.bench.selftest import SECTIONS, Result, run, write
    from npu_rec.device import get_device

    unknown = [name for name in only or [] if name not in SECTIONS]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there are {', '.join(SECTIONS)}")
    sections = [name for name in SECTIONS if name in (only or SECTIONS)]

    def tell(result: Result) -> None:
        if result.checks and result.checks[-1].section == result.under_way:
            check = result.checks[-1]
            print(f"{check.status:7} {check.section}: {check.name}: {check.detail}", file=sys.stderr, flush=True)
        write(result, out)  # each time, so that a crash or a hang leaves a report as well

    result = run(get_device(device), sections, tell)  # type: ignore[arg-type]
    write(result, out)
    counts = {status: result.count(status) for status in ("passed", "failed", "skipped")}
    document = {"device": result.device, **counts, "checks": result.as_dict()["checks"], "report": out}

    def show(console: Console) -> None:
        table = Table("section", *counts)
        for section in sections:
            table.add_row(section, *(str(result.count(status, section)) for status in counts))
        console.print(table)
        console.print(f"self-test on {result.device}: {result.verdict}\nreport  {out}")

    _emit(as_json, document, show)
    if counts["failed"]:
        raise TrainingError(f"{result.verdict}; the report is {out}")


@app.command()
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
    from npu_rec.scaling import finished_rows, load_study, points_table, read_results, run_sweep, write_report

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
    rows = finished_rows(study, read_results(folder / "results.jsonl"))
    folder.mkdir(parents=True, exist_ok=True)
    report = write_report(study, rows, folder)
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
        table = Table(*heads)
        for row in cells:
            table.add_row(*row)
        console.print(table)
        console.print(f"{len(rows)} of {len(study.points)} points are finished\nreport  {report.path}")

    _emit(as_json, document, show)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(study.points)} points failed: {failed[0]['point']}: {failed[0]['reason']}"
        )


@app.command()
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

    loaded = _load(config, set_)
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

    _emit(as_json, as_document(made), display)


@app.command()
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
    _load(config, set_)  # every name in it, as `train` checks them
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
    _emit(as_json, document, lambda console: print(plan.shown() if answer is None else answer))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can run, and why not the rest."""
    from npu_rec.device import device_report, get_device
    from npu_rec.ops import OPERATORS
    from npu_rec.ops.compiled import usable_instruction_set

    report = device_report()
    device = get_device("auto")
    operators = {name: operator.availability(device.torch_device) for name, operator in OPERATORS.items()}
    instruction_set, missing = usable_instruction_set()
    document = {
        "device": report["devices"],
        "selected": device.name,
        "operators": operators,
        "cpp_instruction_set": instruction_set,
    } | {key: value for key, value in report.items() if key not in ("devices", "selected")}

    def show(console: Console) -> None:
        devices = Table(
            "device", "usable", "what", title=f"device.backend: auto takes {device.name}", title_justify="left"
        )
        for name, entry in report["devices"].items():
            usable = bool(entry["available"])
            devices.add_row(
                name, "yes" if usable else "no", str(entry.get("name", "")) if usable else str(entry["reason"])
            )
        console.print(devices)
        table = Table(
            "operator", "backends, the fastest first", title=f"operators on {device.name}", title_justify="left"
        )
        for name, backends in operators.items():
            table.add_row(name, "\n".join(b if reason is None else f"{b}: {reason}" for b, reason in backends.items()))
        console.print(table)
        for title in ("versions", "environment"):
            console.print(
                f"{title}: " + (", ".join(f"{k} {v}" for k, v in report[title].items() if v) or "nothing set")
            )
        console.print(f"compiler: {report['compiler'] or 'none found'}")
        console.print(f"instruction set of cpp: {instruction_set or f'none: {missing}'}")

    _emit(as_json, document, show)


def _load(config: str, overrides: list[str] | None) -> Any:
    from npu_rec.train import load_run_config

    return load_run_config(config, overrides)


def _metrics_table(metrics: dict[str, dict[str, float]]) -> Table:
    table = Table("metric", *metrics)
    for name in dict.fromkeys(name for values in metrics.values() for name in values):
        table.add_row(name, *(f"{values[name]:.4f}" if name in values else "" for values in metrics.values()))
    return table


if __name__ == "__main__":
    main()
