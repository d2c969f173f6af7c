"""`cluster:`, the machines that a run is planned for and launched on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from npu_rec.config.schedulers import KubernetesConfig, Line, ModelArtsConfig, SlurmConfig, Text, Word, matching
from npu_rec.config.section import NonNegative, Positive, Section
from npu_rec.config.variables import wrong_variable

_UNITS = {unit: 1024**power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))}


def parse_bytes(text: str) -> int:
    """Bytes of `64GiB`, `512 MiB`, `1.5TB` (a B that is not iB counts in thousands) or a plain number.

    Raises:
        ValueError: it is none of these, or nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTP]?)(i?)B?)?\s*", text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is no size; write it as 64GiB")
    unit = _UNITS[match[2]] if match[3] or not match[2] else 1000 ** list(_UNITS).index(match[2])
    size = int(float(match[1]) * unit)
    if size < 1:
        raise ValueError(f"{text!r} is no size; write it as 64GiB")
    return size


def _is_size(text: str) -> str:
    parse_bytes(text)
    return text


Size = Annotated[str, BeforeValidator(str), AfterValidator(_is_size)]


def _is_absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path: it holds on every machine")
    return path


def _are_variables(env: dict[str, str]) -> dict[str, str]:
    for name, value in env.items():
        if reason := wrong_variable(name, value):
            raise ValueError(reason)
    if {"PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} <= env.keys():
        raise ValueError("PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF exclude each other")
    return env


def _are_distinct(hosts: list[str]) -> list[str]:
    for place, host in enumerate(hosts):
        if host in hosts[:place]:
            raise ValueError(f"{host} is there twice, as node {hosts.index(host)} and node {place}")
    return hosts


class LinkConfig(Section):
    """What a card can send, for the times that `plan` estimates."""

    within_node: float = Field(
        196.0, gt=0, description="GB/s (10^9 bytes) that a card sends to the other cards of its node."
    )
    between_nodes: float = Field(25.0, gt=0, description="GB/s that a card sends to cards of other nodes.")
    host: float = Field(12.0, gt=0, description="GB/s between the hosts of two processes, for ids (gloo).")


class ClusterConfig(Section):
    """The machines a run is planned for and launched on; training itself reads nothing of it."""

    nodes: Positive = Field(1, description="Machines.")
    cards_per_node: Positive = Field(8, description="Cards of each, with a process each.")
    memory: Size = Field("64GiB", description="Device memory of a card, for `plan`.")
    host_memory: Size = Field("1536GiB", description="Memory of a machine, for `plan`.")
    links: LinkConfig = Field(default_factory=LinkConfig, description="Speeds, for `plan`.")
    image: Word | None = Field(None, description="Container image, for Volcano, AscendJob and ModelArts.")
    workdir: Annotated[Path, AfterValidator(_is_absolute)] | None = Field(
        None,
        description="Folder in which the job runs, the same on all machines; relative paths of the configuration "
        "start there. Unset: the current directory for torchrun and Slurm, that of the image elsewhere.",
    )
    setup: list[Line] = Field(
        [], description="Shell lines before training, such as `source /usr/local/Ascend/ascend-toolkit/set_env.sh`."
    )
    env: Annotated[dict[str, Text], AfterValidator(_are_variables)] = Field(
        {}, description="Environment variables; those of HCCL, CANN and torch_npu are checked."
    )
    interface: (
        Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9._@:-]*", "the name of one interface, as eth0")] | None
    ) = Field(None, description="Network interface between the machines, such as `eth0`. Unset: HCCL and gloo choose.")
    hosts: Annotated[list[Word], AfterValidator(_are_distinct)] = Field(
        [], description="Addresses or names of the machines for torchrun; the first holds rank 0."
    )
    master_port: int | None = Field(
        None,
        ge=1024,
        le=65520,
        description="Port of the first machine at which ranks meet. Unset: 29500; under Slurm one by the job's number, "
        "for AscendJob 2222.",
    )
    max_restarts: NonNegative = Field(
        3, le=100, description="Times that torchrun, and then the scheduler, starts a failed job anew."
    )
    rank_table: Path | None = Field(
        None,
        description="Rank table of HCCL (version 1.0, 1.2 or 2.0), the same path on all machines. Unset: HCCL "
        "negotiates.",
    )
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig)
    modelarts: ModelArtsConfig = Field(default_factory=ModelArtsConfig)

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if self.hosts and len(self.hosts) != self.nodes:
            raise ValueError(f"hosts names {len(self.hosts)} of the machines, but nodes is {self.nodes}")
        if self.nodes > 1 and "HCCL_IF_IP" in self.env:
            raise ValueError("env: HCCL_IF_IP is the address of one machine; set cluster.interface instead")
        return self
