"""Slurm: a script for sbatch."""

from __future__ import annotations

import shlex

from npu_rec.errors import UserError
from npu_rec.launching.checks import check_config_file, check_rank_table
from npu_rec.launching.environment import preparation
from npu_rec.launching.job import Job, Launch
from npu_rec.launching.render import render

_CARDS = {"ascend": "npu", "cuda": "gpu", "cpu": None}


def render_slurm(job: Job) -> Launch:
    """The script, written into the run directory, and the call of sbatch."""
    cluster = job.config.cluster
    slurm = cluster.slurm
    check_config_file(job)
    if check_rank_table(job) is not None and not any(d.startswith(("--nodelist", "-w")) for d in slurm.directives):
        raise job.error(
            "cluster.rank_table",
            "names servers: add --nodelist=... to cluster.slurm.directives, so that Slurm takes them",
        )
    gres = slurm.gres or _CARDS[job.device]
    folder = job.workdir / job.where / "launch"
    if "\\" in str(folder):
        raise UserError(f"{folder}: Slurm can write no log to a path with a backslash")
    script = render(
        "slurm/job.sh.j2",
        title=job.config.name,
        options=[*_options(job, gres, str(folder)), *slurm.directives],
        nodes=cluster.nodes,
        cards=cluster.cards_per_node,
        workdir=job.workdir,
        **preparation(job, str(cluster.rank_table) if cluster.rank_table else None),
        gres_devices=gres.partition(":")[0] if gres and job.device != "cuda" else None,
        max_restarts=cluster.max_restarts,
        master_port=cluster.master_port,
        arguments=job.train_arguments(),
    )
    return Launch({folder / "slurm.sh": script}, [["sbatch", str(folder / "slurm.sh")]], job.workdir)


def _options(job: Job, gres: str | None, folder: str) -> list[str]:
    cluster, slurm = job.config.cluster, job.config.cluster.slurm
    options = [
        f"--job-name={job.config.name}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        *([f"--gres={gres}:{cluster.cards_per_node}"] if gres else []),
        *([f"--cpus-per-task={slurm.cpus}"] if slurm.cpus else ["--exclusive", "--mem=0"]),
        *[f"--{name}={value}" for name in ("partition", "account", "qos", "time") if (value := getattr(slurm, name))],
        f"--output={folder.replace('%', '%%')}/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
    ]
    return [shlex.quote(option) for option in options]
