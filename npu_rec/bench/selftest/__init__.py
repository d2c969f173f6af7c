"""`npu-rec selftest`: whether a device computes what the CPU computes, and how fast, in one report file."""

from npu_rec.bench.selftest.check import Check
from npu_rec.bench.selftest.report import markdown, write
from npu_rec.bench.selftest.run import SECTIONS, Result, run

__all__ = ["SECTIONS", "Check", "Result", "markdown", "run", "write"]
