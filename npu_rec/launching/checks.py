"""What must fit together before anything is queued."""

from __future__ import annotations

from pathlib import Path

from npu_rec.config import find_config, load_config
from npu_rec.errors import ConfigError
from npu_rec.launching.job import Job
from npu_rec.launching.rank_table import RankTable, read_rank_table


def check_division(job: Job) -> None:
    """The ranks can be divided as the configuration says.

    Raises:
        ConfigError: they cannot.
    """
    cluster = job.config.cluster
    for key, size in (
        ("parallel.context", job.config.parallel.context),
        ("embedding.replicas", job.config.embedding.replicas),
    ):
        if job.ranks > 1 and job.ranks % size:
            raise job.error(
                key,
                f"{cluster.nodes} nodes x {cluster.cards_per_node} cards = {job.ranks} ranks cannot be divided by "
                f"{size}",
            )


def check_config_file(job: Job) -> None:
    """The job, which starts in `cluster.workdir`, composes the configuration that was composed here.

    Raises:
        ConfigError: it finds no file of that name there, or another one.
    """
    path = Path(job.config_path)
    if path.is_absolute() or not job.workdir.is_dir():
        return  # found by its path everywhere; or the folder cannot be seen from here
    try:
        there = find_config(path, job.workdir)
    except ConfigError:
        raise job.error(
            "cluster.workdir", f"{job.workdir} has no {path}, which the job would train with; copy it there"
        ) from None
    if load_config(there, list(job.overrides)).model_dump() != job.config.model_dump():
        raise job.error(
            "cluster.workdir", f"{there}, which the job would train with, says something else than {path} here"
        )


def check_rank_table(job: Job) -> RankTable | None:
    """The rank table of `cluster.rank_table`, which has the job's ranks; None where there is none.

    Raises:
        ConfigError: it cannot be used for this job.
    """
    path, cluster = job.config.cluster.rank_table, job.config.cluster
    if path is None:
        return None
    if job.device != "ascend":
        raise job.error("cluster.rank_table", f"is for Ascend, but device.backend is {job.device}; leave it out")
    if not path.is_absolute():
        raise job.error("cluster.rank_table", f"HCCL wants the full path, not {path}")
    table = read_rank_table(path)
    if table.ranks != job.ranks:
        raise job.error(
            "cluster.rank_table",
            f"{path} has {table.ranks} ranks, but {cluster.nodes} nodes x {cluster.cards_per_node} cards are "
            f"{job.ranks}",
        )
    table.check_nodes(cluster.nodes, cluster.cards_per_node)
    return table
