"""Volcano: a job of batch.volcano.sh/v1alpha1, and the ConfigMap of the rank table."""

from __future__ import annotations

from npu_rec.launching.checks import check_rank_table
from npu_rec.launching.environment import preparation
from npu_rec.launching.job import Job, Launch
from npu_rec.launching.kubernetes import Volume, check_accelerator, render_manifest, train_arguments
from npu_rec.launching.render import render

_TABLE_FOLDER = "/user/serverid/devindex/config"  # where Ascend's software looks for hccl.json in a pod
_TABLE_COPY = "/tmp/hccl.json"


def render_volcano(job: Job) -> Launch:
    """The manifest for kubectl."""
    cluster = job.config.cluster
    check_accelerator(job)
    table = _rank_table(job)
    start = render(
        "kubernetes/volcano.sh.j2",
        nodes=cluster.nodes,
        cards=cluster.cards_per_node,
        **preparation(job, _TABLE_COPY if table else None),
        rank_table=table,
        master_port=cluster.master_port or 29500,
        max_restarts=cluster.max_restarts,
        arguments=train_arguments(job),
    )
    rings = Volume("rank-table", _TABLE_FOLDER, "configMap", {"name": f"rings-config-{job.label}"}, read_only=True)
    return render_manifest(
        job,
        "kubernetes/volcano.yaml.j2",
        start,
        container="npu-rec",
        rank_table=table,
        volumes=[rings] if table else [],
    )


def _rank_table(job: Job) -> str | None:
    """The text of the ConfigMap: a table, or `initializing`; None where HCCL negotiates."""
    kubernetes = job.config.cluster.kubernetes
    table = check_rank_table(job)
    if table is None:
        if kubernetes.rank_table == "controller" and job.device != "ascend":
            raise job.error("cluster.kubernetes.rank_table", f"is for Ascend, but device.backend is {job.device}")
        return "initializing" if kubernetes.rank_table == "controller" else None
    if kubernetes.rank_table == "controller":
        raise job.error("cluster.rank_table", "leave it out, or set cluster.kubernetes.rank_table to none: one of them")
    if not table.servers:
        raise job.error(
            "cluster.rank_table", f"version {table.version} names no servers, so pods cannot find their place"
        )
    if not kubernetes.host_network:
        raise job.error("cluster.rank_table", "names machines: set cluster.kubernetes.host_network to true")
    return table.text
