"""The environment variables of a job, each with the reason for its value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from npu_rec.launching.job import Job


@dataclass(frozen=True)
class Variable:
    """A line `export NAME=VALUE` and the comment above it."""

    name: str
    value: str
    comment: str


def preparation(job: Job, rank_table: str | None = None) -> dict[str, Any]:
    """What launch/shell/environment.sh.j2 needs: the lines of `cluster.setup`, the interface, the variables.

    Args:
        rank_table: path of the rank table on the machines.
    """
    cluster = job.config.cluster
    used = any(variable.name not in cluster.env for variable in _interfaces(job))
    return {
        "setup": cluster.setup,
        # An alias, eth0:1, is an address of eth0 and no device.
        "interface": cluster.interface.partition(":")[0] if cluster.interface and used else None,
        "environment": environment(job, rank_table),
    }


def environment(job: Job, rank_table: str | None = None) -> list[Variable]:
    """What the job's processes find set: the device's variables, replaced and followed by `cluster.env`.

    Args:
        rank_table: path of the rank table on the machines.
    """
    own = {variable.name: variable for variable in _interfaces(job)}
    if job.device == "ascend":
        own |= {variable.name: variable for variable in _ascend(job)}
    if rank_table is not None:
        own["RANK_TABLE_FILE"] = Variable(
            "RANK_TABLE_FILE", rank_table, "Which card is which rank, a file and no link."
        )
    if "PYTORCH_ALLOC_CONF" in job.config.cluster.env:
        own.pop("PYTORCH_NPU_ALLOC_CONF", None)  # torch_npu wants one of the two
    given = {name: Variable(name, value, "From cluster.env.") for name, value in job.config.cluster.env.items()}
    return list((own | given).values())


def _ascend(job: Job) -> list[Variable]:
    timeout = job.config.parallel.timeout
    # Both lie between the watchdog's limit and that of the process group, which is 2 * timeout + 60.
    connect, execute = math.ceil(1.2 * timeout) + 20, math.ceil(1.5 * timeout) + 40
    return [
        Variable(
            "HCCL_CONNECT_TIMEOUT",
            str(min(max(connect, 120), 7200)),
            "Seconds, 120 to 7200, that ranks wait for each other's first connection; HCCL's default is 120. Longer "
            f"than parallel.timeout ({timeout:g} s), whose message says more.",
        ),
        Variable(
            "HCCL_EXEC_TIMEOUT",
            str(execute),
            "Seconds that a collective may take; HCCL's default is 1836. Longer than both.",
        ),
        Variable(
            "HCCL_WHITELIST_DISABLE", "1", "No list of the hosts that may connect; the cluster's network is trusted."
        ),
        Variable(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "Batches differ in length; segments that grow keep the memory from being cut up.",
        ),
    ]


def _interfaces(job: Job) -> list[Variable]:
    interface = job.config.cluster.interface
    if interface is None:
        return []
    sockets = {"ascend": "HCCL_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME"}
    variables = [
        Variable("GLOO_SOCKET_IFNAME", interface, "The interface for ids and small values on the host (gloo).")
    ]
    if job.device in sockets:
        library = sockets[job.device].partition("_")[0]
        variables.append(
            Variable(
                sockets[job.device],
                f"={interface}",
                f"The interface by which {library} finds the other hosts; = takes exactly that name.",
            )
        )
    return variables
