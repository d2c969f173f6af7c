"""Taking out of a report what tells whose machine it was: people send it to others."""

from __future__ import annotations

import getpass
import re
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from npu_rec.bench.selftest.check import Check

PACKAGE = Path(__file__).resolve().parents[3]  # the folder that npu_rec lies in

# Folders that vendors' software is installed in, the same on many machines.
_COMMON = r"(?:usr|opt|etc|bin|lib|dev|proc|sys)/"
_OTHER_PATH = re.compile(rf"(?<![\w.~<>/-])(?:///|/)(?!{_COMMON})(?:[\w.+@-]+/)+([\w.+@-]*)")


def scrub(text: str) -> str:
    """`text` without the names of user and host, and with paths shortened to what says something."""
    for place, name in _places():
        text = text.replace(place, name)
    text = _OTHER_PATH.sub(r"<path>/\1", text)
    for secret, name in _names():
        text = re.sub(rf"(?<![\w.-]){re.escape(secret)}(?![\w-])", name, text)
    return text


def scrubbed(check: Check) -> Check:
    """The check with its texts scrubbed."""
    trace = None if check.traceback is None else scrub(check.traceback)
    return replace(check, detail=scrub(check.detail), traceback=trace)


def scrubbed_report(report: dict[str, Any]) -> dict[str, Any]:
    """`device_report()` with its free texts scrubbed: environment, compiler, reasons."""
    devices = {
        name: entry | {"reason": scrub(entry["reason"])} if "reason" in entry else entry
        for name, entry in report["devices"].items()
    }
    environment = {name: scrub(value) for name, value in report["environment"].items()}
    compiler = None if report["compiler"] is None else scrub(report["compiler"])
    return report | {"devices": devices, "environment": environment, "compiler": compiler}


@cache
def _places() -> list[tuple[str, str]]:
    """Folders and what stands for them, the deepest first: one may lie in another."""
    places = {str(Path.home()): "~", tempfile.gettempdir(): "<tmp>"}
    places |= dict.fromkeys((sys.base_prefix, sys.prefix), "<python>") | {str(PACKAGE): "<package>"}
    return sorted(((place, name) for place, name in places.items() if len(place) > 1), key=lambda pair: -len(pair[0]))


@cache
def _names() -> list[tuple[str, str]]:
    host, user = socket.gethostname(), ""
    with suppress(OSError, KeyError):  # a process without an entry in the user database has no name to hide
        user = getpass.getuser()
    names = {host: "<host>", host.partition(".")[0]: "<host>", user: "<user>"}
    return [(secret, name) for secret, name in names.items() if secret not in ("", "root", "localhost")]
