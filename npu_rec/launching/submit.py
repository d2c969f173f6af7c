"""Does what a launch says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from npu_rec.errors import TrainingError, UserError
from npu_rec.launching.job import Launch

_FROM = {
    "sbatch": "run this on a machine of the Slurm cluster",
    "kubectl": "install it and point it at the cluster",
    "ma-cli": "install it and log in (docs/launch.md)",
}


def submit(launch: Launch) -> str:
    """Write the files and run the commands; what the scheduler answered. torchrun does not return.

    This interpreter's folder comes first on their PATH, so that `python3` has npu-rec, here and in a job of Slurm, to
    which sbatch passes the environment on.

    Raises:
        UserError: a file cannot be written, a folder or a program is missing.
        TrainingError: the scheduler refused.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": path}
    if launch.workdir is not None and not launch.workdir.is_dir():
        raise UserError(f"cluster.workdir {launch.workdir}: is no folder of this machine; all machines must see it")
    for command in launch.commands:
        if shutil.which(command[0], path=path) is None:
            advice = _FROM.get(command[0], "install it")
            raise UserError(f"{command[0]} is not on the PATH: {advice}, or see what it would get with --dry-run")
    for file, text in launch.files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{file}: cannot be written ({error.strerror}); is it on a disk that this machine shares?"
            ) from None
    if launch.replaces:
        sys.stdout.flush()
        os.execvpe(launch.commands[-1][0], launch.commands[-1], environment)
    answers = []
    for command in launch.commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())
            raise TrainingError(f"{command[0]} ended with exit code {done.returncode}: {said}")
        answers.append(done.stdout.strip())
    return "\n".join(answer for answer in answers if answer)
