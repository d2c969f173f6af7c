"""Programs that the tests of launching put in the place of others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_PYTHON3 = """#!/usr/bin/env bash
if [[ "$1 $2" != "-m torch.distributed.run" ]]; then exec {python} "$@"; fi
shift 2
{script}
"""

# The task `fatal`: rank 1 dies in step 6 of its first start, when the checkpoint of step 4 is written to `run`. Drawing
# the report and timing the processor, which take longer than such a training, are left out.
FATAL = """
import os
import signal
import time
from pathlib import Path

from npu_rec.registry import register
from npu_rec.tasks import Retrieval
from npu_rec.tasks.retrieval import RetrievalOptions
from npu_rec.train import trainer

trainer.write_report = lambda *arguments, **options: None
trainer.matmul_flops = lambda *arguments, **options: 1e12


@register("task", "fatal", options=RetrievalOptions)
class Fatal(Retrieval):
    steps = 0

    def loss(self, prepared):
        self.steps += 1
        if self.steps == 6 and os.environ["RANK"] == "1" and not Path("died").exists():
            while not Path("run/checkpoints/step-4").exists():
                time.sleep(0.05)
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(prepared)
"""


def program(folder: Path, name: str, script: str) -> Path:
    """A program of that name in `folder`, a script with its own first line."""
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)
    return path


def in_place_of_torchrun(folder: Path, script: str) -> None:
    """A `python3` in `folder` that runs `script` (bash), with torchrun's arguments, when torchrun is asked for.

    It is this interpreter for everything else.
    """
    program(folder, "python3", _PYTHON3.format(python=shlex.quote(sys.executable), script=script))
