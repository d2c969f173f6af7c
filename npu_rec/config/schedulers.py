"""The parts of `cluster:` that are for one scheduler each (docs/launch.md)."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from npu_rec.config.section import Positive, Section
from npu_rec.config.variables import is_one_line


def matching(pattern: str, what: str) -> AfterValidator:
    """The whole text matches `pattern`; otherwise the error says that it must be `what`."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {what}")
        return text

    return AfterValidator(check)


Word = Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9._/@:-]*", "one word of letters, digits and . _ / @ : -")]
Label = Annotated[str, matching(r"[a-z0-9]([a-z0-9-]{,61}[a-z0-9])?", "small letters, digits and hyphens, at most 63")]


def _one_line(text: str) -> str:
    if not is_one_line(text):
        raise ValueError("it has more than one line, or control characters")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


def _text_of_number(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text_of_number)]
"""A string; YAML's numbers count as one."""


def _are_directives(lines: list[str]) -> list[str]:
    for line in lines:
        if not re.fullmatch(r"--?[A-Za-z].*", line):
            raise ValueError(f"{line!r} is no option of sbatch; write it as --constraint=910b")
    return lines


def _are_mounts(mounts: dict[str, str]) -> dict[str, str]:
    for path, source in mounts.items():
        if not PurePosixPath(path).is_absolute():
            raise ValueError(f"{path!r} is no absolute path in the container")
        if not is_one_line(path + source):
            raise ValueError(f"{path!r}: {source!r} has control characters")
        if not re.fullmatch(r"claim:[a-z0-9.-]+|host:/.*|nfs:[^:]+:/.*", source):
            raise ValueError(f"{path}: {source!r} is none of claim:NAME, host:/FOLDER, nfs:SERVER:/FOLDER")
    return mounts


class SlurmConfig(Section):
    """Slurm."""

    partition: Word | None = Field(None, description="Partition; unset: the default one.")
    account: Word | None = Field(None, description="Account that is charged.")
    qos: Word | None = Field(None, description="Quality of service.")
    time: Annotated[str, matching(r"(\d+-)?\d+(:\d+){0,2}", "a time as 12:00:00 or 1-00:00:00")] | None = Field(
        None, description="Limit of the time, such as 1-00:00:00."
    )
    gres: Word | None = Field(
        None, description="Name of the cards (GRES), type included. Unset: `npu`; `gpu` on CUDA, none on CPUs."
    )
    cpus: Positive | None = Field(
        None, description="CPUs of a node that the job takes. Unset: all, and the node for itself."
    )
    directives: Annotated[list[Line], AfterValidator(_are_directives)] = Field(
        [], description="Further options of sbatch, such as `--constraint=910b`."
    )


class KubernetesConfig(Section):
    """Volcano and AscendJob."""

    namespace: Label = Field("default", description="Namespace.")
    queue: Label = Field("default", description="Queue of Volcano.")
    mounts: Annotated[dict[str, str], AfterValidator(_are_mounts)] = Field(
        {},
        description="Folder in the container -> what is there: `claim:NAME` (a volume claim), `host:/FOLDER` of the "
        "machine, or `nfs:SERVER:/FOLDER`. The run directory is below one of them.",
    )
    requests: dict[Word, Text] = Field({}, description="What a pod asks for besides cards, such as `cpu`, `memory`.")
    resource: Word | None = Field(
        None,
        description="Name of the cards. Unset: `huawei.com/Ascend910`; `nvidia.com/gpu` on CUDA, none on CPUs.",
    )
    accelerator_type: Word | None = Field(
        "module-910b-8",
        description="Label `accelerator-type` of the nodes (Ascend), such as `card-910b-2`, `module-910b-16`.",
    )
    host_arch: Literal["huawei-arm", "huawei-x86"] = Field(
        "huawei-arm", description="Label `host-arch` of the nodes (Ascend)."
    )
    host_network: bool = Field(False, description="Pods use the network of their machine.")
    pull_secret: Label | None = Field(None, description="Secret for the registry of `cluster.image`.")
    rank_table: Literal["none", "controller"] = Field(
        "none",
        description="Volcano: HCCL negotiates, or the `controller` of MindCluster fills in a rank table, for which the "
        "pods wait.",
    )
    fault_scheduling: Literal["grace", "force", "off"] = Field(
        "grace", description="What MindCluster does with the pods after a fault (Ascend)."
    )


ObsFolder = Annotated[str, matching(r"obs://[a-z0-9.-]+(/[^\s/]+)+/?", "a folder in OBS, as obs://BUCKET/FOLDER/")]


class ModelArtsConfig(Section):
    """ModelArts."""

    flavor: Word | None = Field(None, description="Machine type, as `ma-cli ma-job get-flavor` lists them.")
    pool: Word | None = Field(None, description="Id of a dedicated pool; unset: the public one.")
    code_url: ObsFolder | None = Field(None, description="OBS folder for the files of the launch.")
    log_url: ObsFolder | None = Field(None, description="OBS folder for logs.")
