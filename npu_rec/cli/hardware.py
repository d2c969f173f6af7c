"""bench, lower, selftest, doctor: what a device and its backends can do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from npu_rec.cli.arguments import JsonOption
from npu_rec.cli.output import emit
from npu_rec.errors import TrainingError, UserError


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

    emit(
        as_json,
        {"device": place.name, "rows": [asdict(row) for row in rows]},
        lambda console: console.print(table_of(rows)),
    )


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
    emit(as_json, {"rows": [asdict(row) for row in rows]}, lambda console: console.print(lowering.table_of_rows(rows)))
    if table is not None:
        try:
            table.write_text(lowering.markdown(rows), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--table {table} cannot be written: {error.strerror}") from None
    failed = sum(row.status != "lowered" for row in rows)
    if failed:
        raise TrainingError(f"{failed} of {len(rows)} kernels do not lower or do not fit")


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

    emit(as_json, document, show)
    if counts["failed"]:
        raise TrainingError(f"{result.verdict}; the report is {out}")


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

    emit(as_json, document, show)
