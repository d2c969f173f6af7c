"""The report file: Markdown for people, with everything as JSON at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from npu_rec.bench.selftest.run import Result
from npu_rec.errors import UserError


def write(result: Result, path: Path) -> None:
    """Write the report, over an older one.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(markdown(result), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}") from None


def markdown(result: Result) -> str:
    """The whole report."""
    blocks = (_head(result), _summary(result), _failures(result), _tables(result), _machine(result), _json(result))
    return "\n".join(line for block in blocks for line in block)


def _head(result: Result) -> Iterator[str]:
    entry, machine = result.machine["devices"][result.device], result.machine
    yield f"# npu-rec self-test on {result.device}: {result.verdict}"
    yield ""
    memory = entry.get("memory_bytes")
    parts = [str(entry.get("name")), f"{entry.get('count')} visible", f"{memory / 2**30:.0f} GiB" if memory else ""]
    yield f"- device: {', '.join(filter(None, parts))}"
    versions = {"npu_rec": machine["npu_rec"]} | machine["versions"]
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items() if version)}"
    yield f"- CPU threads: {machine['threads']}; instruction set of cpp: {machine['cpp_instruction_set'] or 'none'}"
    yield ""


def _summary(result: Result) -> Iterator[str]:
    yield "| section | passed | failed | skipped | seconds |"
    yield "|---|---|---|---|---|"
    for section in result.sections:
        counts = (result.count(status, section) for status in ("passed", "failed", "skipped"))
        seconds = sum(check.seconds for check in result.checks if check.section == section)
        yield f"| {section} | {' | '.join(map(str, counts))} | {seconds:.1f} |"
    yield ""


def _failures(result: Result) -> Iterator[str]:
    failed = [check for check in result.checks if check.status == "failed"]
    if failed:
        yield "## Failures"
        yield ""
    for check in failed:
        yield f"### {check.section}: {check.name}"
        yield ""
        yield check.detail
        yield ""
        if check.traceback is not None:
            yield "```text"
            yield check.traceback.rstrip()
            yield "```"
            yield ""


def _tables(result: Result) -> Iterator[str]:
    for section in result.sections:
        yield f"## {section.capitalize()}"
        yield ""
        yield "| check | status | what was seen | seconds |"
        yield "|---|---|---|---|"
        for check in result.checks:
            if check.section == section:
                status = "**failed**" if check.status == "failed" else check.status
                detail = check.detail.replace("|", "\\|")
                yield f"| {check.name} | {status} | {detail} | {check.seconds:.1f} |"
        yield ""


def _machine(result: Result) -> Iterator[str]:
    yield "## Environment"
    yield ""
    environment = result.machine["environment"]
    yield from (f"- `{name}={value}`" for name, value in environment.items())
    if not environment:
        yield "None of the variables that matter is set."
    yield ""


def _json(result: Result) -> Iterator[str]:
    yield "## Everything, for programs"
    yield ""
    yield "```json"
    yield json.dumps(result.as_dict(), indent=1, default=str)
    yield "```"
    yield ""
