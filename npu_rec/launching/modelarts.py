"""ModelArts: files for OBS and a training job, both by its command line tool, ma-cli."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePosixPath

from npu_rec.errors import UserError
from npu_rec.launching.checks import check_rank_table
from npu_rec.launching.environment import preparation
from npu_rec.launching.job import Job, Launch
from npu_rec.launching.kubernetes import frozen_config
from npu_rec.launching.render import render

_CODE = PurePosixPath("/home/ma-user/modelarts/user-job-dir")  # MA_JOB_DIR: where ModelArts puts the folder of code


def render_modelarts(job: Job) -> Launch:
    """Start script and configuration, their upload, and the submission."""
    cluster = job.config.cluster
    modelarts = cluster.modelarts
    _check(job)
    assert modelarts.code_url is not None
    code_url = modelarts.code_url.rstrip("/") + "/"
    code = _CODE / PurePosixPath(code_url.removeprefix("obs:/")).name
    boot = render(
        "modelarts/boot.sh.j2",
        title=job.config.name,
        nodes=cluster.nodes,
        cards=cluster.cards_per_node,
        cards_counted=job.device != "cpu",
        workdir=cluster.workdir,
        **preparation(job),
        master_port=cluster.master_port or 29500,
        max_restarts=cluster.max_restarts,
        arguments=job.train_arguments(str(code / "config.yaml"), str(job.where)),
    )
    folder = Path("runs") / job.config.name / "launch"
    submission = {
        "--name": job.label,
        "--image-url": cluster.image,
        "--code-dir": code_url,
        "--user-command": shlex.join(["bash", str(code / "boot.sh")]),
        "--train-instance-type": modelarts.flavor,
        "--train-instance-count": str(cluster.nodes),
        "--pool-id": modelarts.pool,
        "--log-url": modelarts.log_url,
    }
    options = [word for name, value in submission.items() if value is not None for word in (name, value)]
    return Launch(
        {folder / "boot.sh": boot, folder / "config.yaml": frozen_config(job)},
        [
            ["ma-cli", "obs-copy", str(folder / "boot.sh"), code_url],
            ["ma-cli", "obs-copy", str(folder / "config.yaml"), code_url],
            ["ma-cli", "ma-job", "submit", *options],
        ],
    )


def _check(job: Job) -> None:
    cluster = job.config.cluster
    needed = {
        "cluster.image": (cluster.image, "the address of an image with npu-rec in SWR (launch/images)"),
        "cluster.modelarts.flavor": (cluster.modelarts.flavor, "a machine type; `ma-cli ma-job get-flavor` lists them"),
        "cluster.modelarts.code_url": (
            cluster.modelarts.code_url,
            "an OBS folder for the start script, obs://BUCKET/FOLDER",
        ),
    }
    for key, (value, what) in needed.items():
        if value is None:
            raise job.error(key, f"is not set: ModelArts needs {what}")
    if not job.where.is_absolute():
        raise UserError(
            f"--run-dir {job.where}: ModelArts needs an absolute folder that outlives the container, such as a mount "
            "of SFS Turbo"
        )
    if check_rank_table(job) is not None:
        raise job.error("cluster.rank_table", "ModelArts chooses the machines; leave it out, HCCL negotiates")
