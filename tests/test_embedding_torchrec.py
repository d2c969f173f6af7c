"""The cases of torchrec_cases.py in a process of their own: FBGEMM's operators, once loaded, cannot be stood in for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

CASES = Path(__file__).with_name("torchrec_cases.py")


def test_the_engine_torchrec() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    inner = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=CASES.parents[1], env=inner, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= (30 if find_spec("torchrec") is not None else 5)
