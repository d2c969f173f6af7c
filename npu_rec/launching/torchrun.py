"""torchrun on this machine, or on each of `cluster.hosts`: the same command is given on all of them."""

from __future__ import annotations

import socket

from npu_rec.errors import UserError
from npu_rec.launching.checks import check_config_file, check_rank_table
from npu_rec.launching.environment import preparation
from npu_rec.launching.job import Job, Launch
from npu_rec.launching.rank_table import RankTable
from npu_rec.launching.render import render


def render_torchrun(job: Job) -> Launch:
    """The script of this machine, which takes the place of the launching process."""
    cluster = job.config.cluster
    check_config_file(job)
    table = check_rank_table(job)
    if cluster.nodes > 1 and not cluster.hosts:
        raise job.error(
            "cluster.hosts", f"torchrun on {cluster.nodes} machines needs their addresses, first that of rank 0"
        )
    if table is not None and table.servers:
        _check_order(job, table)
    node = _node_rank(job)
    path = job.workdir / job.where / "launch" / f"torchrun-{node}.sh"
    script = render(
        "torchrun/node.sh.j2",
        title=job.config.name,
        nodes=cluster.nodes,
        node=node,
        host=cluster.hosts[node] if cluster.hosts else "this machine",
        cards=cluster.cards_per_node,
        workdir=job.workdir,
        **preparation(job, str(cluster.rank_table) if cluster.rank_table else None),
        master_addr=cluster.hosts[0] if cluster.hosts else "127.0.0.1",
        master_port=cluster.master_port or 29500,
        max_restarts=cluster.max_restarts,
        arguments=job.train_arguments(),
    )
    return Launch({path: script}, [["bash", str(path)]], job.workdir, replaces=True)


def _node_rank(job: Job) -> int:
    """`--node-rank`, or the place of this machine among `cluster.hosts`."""
    hosts, nodes = job.config.cluster.hosts, job.config.cluster.nodes
    if job.node_rank is not None:
        if not 0 <= job.node_rank < nodes:
            raise UserError(f"--node-rank {job.node_rank}: cluster.nodes is {nodes}, so it is 0 to {nodes - 1}")
        return job.node_rank
    if not hosts:
        return 0
    own = [node for node, host in enumerate(hosts) if is_this_machine(host)]
    if len(own) != 1:
        found = "none" if not own else f"{len(own)}"
        raise UserError(
            f"{found} of cluster.hosts ({', '.join(hosts)}) lead to this machine, {socket.gethostname()}; "
            f"say which it is with --node-rank, 0 to {nodes - 1}"
        )
    return own[0]


def is_this_machine(host: str) -> bool:
    """Whether a name or address is one of this machine: a socket can be bound to it here."""
    if host in (socket.gethostname(), socket.getfqdn()):
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
        except OSError:
            continue
    return False


def _check_order(job: Job, table: RankTable) -> None:
    """Where `hosts` has addresses that the rank table knows, they stand at the same places."""
    for node, host in enumerate(job.config.cluster.hosts):
        place = table.place_of([host])
        if place not in (None, node):
            raise job.error("cluster.hosts", f"{host} is node {node} here, but node {place} in {table.path}")
