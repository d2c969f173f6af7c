"""AscendJob: a job of MindCluster's Ascend Operator, mindxdl.gitee.com/v1."""

from __future__ import annotations

from npu_rec.launching.environment import preparation
from npu_rec.launching.job import Job, Launch
from npu_rec.launching.kubernetes import check_accelerator, render_manifest, train_arguments
from npu_rec.launching.render import render

_PORT = 2222  # the operator's own default for the port of the first pod


def render_ascendjob(job: Job) -> Launch:
    """The manifest for kubectl."""
    cluster = job.config.cluster
    if job.device != "ascend":
        raise job.error("device.backend", f"{job.device}: an AscendJob has NPUs; --scheduler volcano runs on anything")
    if cluster.rank_table is not None or cluster.kubernetes.rank_table != "none":
        key = "cluster.rank_table" if cluster.rank_table is not None else "cluster.kubernetes.rank_table"
        raise job.error(key, "the Ascend Operator numbers the ranks of an AscendJob itself; leave it out")
    check_accelerator(job)
    start = render(
        "kubernetes/ascendjob.sh.j2",
        nodes=cluster.nodes,
        cards=cluster.cards_per_node,
        **preparation(job),
        max_restarts=cluster.max_restarts,
        arguments=train_arguments(job),
    )
    roles = [("Master", 1), *([("Worker", cluster.nodes - 1)] if cluster.nodes > 1 else [])]
    return render_manifest(
        job,
        "kubernetes/ascendjob.yaml.j2",
        start,
        container="ascend",  # the operator looks for a container of this name
        port=cluster.master_port or _PORT,
        roles=roles,
    )
