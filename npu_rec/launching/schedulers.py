"""The schedulers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from npu_rec.config import Config
from npu_rec.config.variables import is_one_line
from npu_rec.errors import UserError
from npu_rec.launching.ascendjob import render_ascendjob
from npu_rec.launching.checks import check_division
from npu_rec.launching.job import Job, Launch
from npu_rec.launching.modelarts import render_modelarts
from npu_rec.launching.slurm import render_slurm
from npu_rec.launching.torchrun import render_torchrun
from npu_rec.launching.volcano import render_volcano

SCHEDULERS: dict[str, Callable[[Job], Launch]] = {
    "torchrun": render_torchrun,
    "slurm": render_slurm,
    "volcano": render_volcano,
    "ascendjob": render_ascendjob,
    "modelarts": render_modelarts,
}


def render_launch(
    config: Config,
    config_path: str | Path,
    *,
    scheduler: str,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    node_rank: int | None = None,
    as_json: bool = False,
) -> Launch:
    """The files and commands of a launch. Nothing is written or run.

    Args:
        config: what `config_path` and `overrides` compose to.
        config_path: the file that the job trains with.
        overrides: `--set` of the command line.
        run_dir: of the run; `runs/<name>` unless given.
        node_rank: with torchrun, which of `cluster.hosts` this machine is, when that cannot be found out.
        as_json: with torchrun, whether `train` prints JSON.

    Raises:
        UserError: no such scheduler, or the configuration does not fit it.
    """
    if scheduler not in SCHEDULERS:
        raise UserError(f"--scheduler {scheduler}: there are {', '.join(SCHEDULERS)}")
    if scheduler != "torchrun" and node_rank is not None:
        raise UserError("--node-rank is for --scheduler torchrun; others number the nodes themselves")
    if run_dir is not None and not is_one_line(str(run_dir)):
        raise UserError(f"--run-dir {str(run_dir)!r}: has more than one line, or control characters")
    job = Job(config, str(config_path), tuple(overrides), run_dir, node_rank, as_json and scheduler == "torchrun")
    check_division(job)
    return SCHEDULERS[scheduler](job)
