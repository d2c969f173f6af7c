"""What one check says, and the guard around it: an exception is a failed check, and the rest goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from npu_rec.errors import BackendError

Figures = dict[str, float]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        section: `operators`, `training`, `collectives` or `speed`.
        detail: one line: what was seen, or the reason.
        traceback: of the exception that failed it; None where a comparison failed.
    """

    section: str
    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0
    traceback: str | None = None


class CheckFailed(Exception):
    """What was seen is wrong; the message says what was seen and what was expected."""

    def __init__(self, detail: str, figures: Figures | None = None) -> None:
        super().__init__(detail)
        self.figures = figures or {}


class CheckSkipped(Exception):
    """It cannot be checked here; the message is the reason."""


def reason(error: BackendError) -> str:
    """Why a backend refused, without its name."""
    return str(error).partition("cannot run here: ")[2] or str(error)


def guarded(section: str, name: str, check: Callable[[], tuple[str, Figures]]) -> Check:
    """Run `check`, which returns its detail and figures, or raises."""
    start = perf_counter()
    figures: Figures = {}
    trace = None
    status: Literal["passed", "failed", "skipped"] = "passed"
    try:
        detail, figures = check()
    except CheckSkipped as error:
        status, detail = "skipped", str(error)
    except CheckFailed as error:
        status, detail, figures = "failed", str(error), error.figures
    except Exception as error:
        lines = str(error).strip().splitlines()
        status, detail = "failed", f"{type(error).__name__}: {lines[0] if lines else ''}"
        trace = traceback.format_exc()
    return Check(section, name, status, " ".join(detail.split()), figures, perf_counter() - start, trace)
