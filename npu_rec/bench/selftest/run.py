"""All sections in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from npu_rec import __version__
from npu_rec.bench.selftest import collectives, operators, speed, training
from npu_rec.bench.selftest.check import Check, Figures, guarded
from npu_rec.bench.selftest.scrub import scrubbed, scrubbed_report
from npu_rec.device import Device, device_report
from npu_rec.ops.compiled import usable_instruction_set

SECTIONS: dict[str, Callable[[Device], Iterator[Check]]] = {
    "operators": operators.checks,
    "training": training.checks,
    "collectives": collectives.checks,
    "speed": speed.checks,
}


@dataclass
class Result:
    """The checks so far, in order.

    Attributes:
        machine: what `device_report` says, and versions of this package.
        under_way: the section that has not ended; None when all have.
    """

    device: str
    machine: dict[str, Any]
    sections: Sequence[str]
    checks: list[Check] = field(default_factory=list)
    under_way: str | None = None

    def count(self, status: str, section: str | None = None) -> int:
        """How many checks ended so."""
        return sum(check.status == status and section in (None, check.section) for check in self.checks)

    @property
    def verdict(self) -> str:
        """`passed`, or what stands against it."""
        failed = self.count("failed")
        if failed:
            return f"{failed} of {len(self.checks)} checks failed"
        return "passed" if self.under_way is None else f"did not end: it was at {self.under_way}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        counts = {status: self.count(status) for status in ("passed", "failed", "skipped")}
        return {
            "device": self.device, "verdict": self.verdict, **counts, "sections": list(self.sections),
            "machine": self.machine, "checks": [_as_dict(check) for check in self.checks],
        }  # fmt: skip


def _run_section(device: Device, section: str, result: Result, told: Callable[[Result], None]) -> tuple[str, Figures]:
    for check in SECTIONS[section](device):
        result.checks.append(scrubbed(check))
        told(result)
    return "", {}


def _as_dict(check: Check) -> dict[str, Any]:
    """JSON has no infinite numbers: they are null."""
    figures = {name: value if math.isfinite(value) else None for name, value in check.figures.items()}
    return asdict(check) | {"figures": figures}


def run(device: Device, sections: Sequence[str], told: Callable[[Result], None]) -> Result:
    """Run sections; `told` is called when a section begins, and after each check.

    The texts of the result name no user, host or folder of this machine.
    """
    instruction_set, _ = usable_instruction_set()
    machine = scrubbed_report(device_report()) | {
        "npu_rec": __version__, "threads": torch.get_num_threads(), "cpp_instruction_set": instruction_set,
    }  # fmt: skip
    result = Result(device.name, machine, sections)
    for section in sections:
        result.under_way = section
        told(result)
        whole = guarded(section, "the section itself", partial(_run_section, device, section, result, told))
        if whole.status == "failed":
            result.checks.append(scrubbed(whole))
            told(result)
    result.under_way = None
    return result
