"""What jobs of Volcano and of the Ascend Operator have in common: pods, their files, their volumes."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from npu_rec.launching.job import CONFIG_MOUNT, Job, Launch
from npu_rec.launching.render import render

_RESOURCES = {"ascend": "huawei.com/Ascend910", "cuda": "nvidia.com/gpu", "cpu": None}
_DRIVER = ("/usr/local/Ascend/driver", "/usr/local/Ascend/add-ons")


@dataclass(frozen=True)
class Volume:
    """A folder in the container; `kind` and `source` are the two halves of a Kubernetes volume."""

    name: str
    path: str
    kind: str
    source: dict[str, Any]
    read_only: bool = False


def render_manifest(job: Job, template: str, start_script: str, *, container: str, **values: Any) -> Launch:
    """The manifest, written below runs/ of this directory, and the call of kubectl.

    Args:
        template: of launch/kubernetes/.
        start_script: what a container runs.
        container: its name.
        values: what the template needs beyond the pod.
    """
    cluster = job.config.cluster
    kubernetes = cluster.kubernetes
    if cluster.image is None:
        raise job.error("cluster.image", "is not set: a pod needs an image with npu-rec (launch/images)")
    manifest = render(
        template,
        title=job.config.name,
        name=job.label,
        nodes=cluster.nodes,
        cards=cluster.cards_per_node,
        namespace=kubernetes.namespace,
        queue=kubernetes.queue,
        max_restarts=cluster.max_restarts,
        labels=_labels(job),
        mount=CONFIG_MOUNT,
        config=frozen_config(job).strip(),
        start_script=start_script.strip(),
        container=container,
        start=str(CONFIG_MOUNT / "start.sh"),
        ascend=job.device == "ascend",
        image=cluster.image,
        workdir=cluster.workdir and cluster.workdir.as_posix(),
        host_network=kubernetes.host_network,
        pull_secret=kubernetes.pull_secret,
        selector=_selector(job),
        resource=_resource(job),
        resources=_resources(job),
        **{"port": None, **values, "volumes": [*_volumes(job), *values.get("volumes", ())]},
    )
    path = Path("runs") / job.config.name / "launch" / PurePosixPath(template).name.removesuffix(".j2")
    return Launch({path: manifest}, [["kubectl", "apply", "-f", str(path)]])


def frozen_config(job: Job) -> str:
    """The keys that differ from their defaults, overrides applied: what a container trains with."""
    kept = job.config.model_dump(mode="json", exclude_defaults=True)
    kept.pop("cluster", None)  # training reads nothing of it
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    if len(text.splitlines()) > text.count("\n"):  # a line end of Unicode's, which YAML would take for one as well
        return yaml.safe_dump(kept, sort_keys=False)
    return text


def train_arguments(job: Job) -> list[list[str]]:
    """Arguments of torchrun in a pod."""
    return job.train_arguments(str(CONFIG_MOUNT / "config.yaml"), str(_run_dir(job)))


def _run_dir(job: Job) -> PurePosixPath:
    """The run directory in the container, on storage that outlives the pod."""
    workdir, mounts = job.config.cluster.workdir, job.config.cluster.kubernetes.mounts
    path = PurePosixPath(posixpath.normpath(PurePosixPath(workdir or "/") / PurePosixPath(job.where)))
    if not job.where.is_absolute() and workdir is None:
        raise job.error(
            "cluster.workdir", f"is not set, so --run-dir must be absolute in the container, not {job.where}"
        )
    if not any(path.is_relative_to(mount) for mount in mounts):
        raise job.error(
            "cluster.kubernetes.mounts",
            f"the run directory {path} is below none of them ({', '.join(mounts) or 'there are none'}) and would be "
            "lost with its pod",
        )
    return path


def check_accelerator(job: Job) -> None:
    """The cards of a pod fit the machines that the label chooses.

    Raises:
        ConfigError: such a machine does not have them, or cannot be divided into such pods.
    """
    kind, cards = job.config.cluster.kubernetes.accelerator_type, job.config.cluster.cards_per_node
    numbers = [int(part) for part in (kind or "").split("-") if part.isdigit()]
    if job.device == "ascend" and numbers and (cards > numbers[-1] or numbers[-1] % cards):
        raise job.error(
            "cluster.cards_per_node",
            f"{cards} cards a pod do not divide the {numbers[-1]} of accelerator_type {kind} (cluster.kubernetes)",
        )


def _labels(job: Job) -> dict[str, str]:
    """For MindCluster: which controller is meant, and what follows a fault."""
    if job.device != "ascend":
        return {}
    cluster = job.config.cluster
    return {
        "ring-controller.atlas": "ascend-910b",
        "fault-scheduling": cluster.kubernetes.fault_scheduling,
        "fault-retry-times": str(cluster.max_restarts),
    }


def _selector(job: Job) -> dict[str, str]:
    kubernetes = job.config.cluster.kubernetes
    if job.device != "ascend":
        return {}
    kind = {} if kubernetes.accelerator_type is None else {"accelerator-type": kubernetes.accelerator_type}
    return {"host-arch": kubernetes.host_arch, **kind}


def _resource(job: Job) -> str | None:
    return job.config.cluster.kubernetes.resource or _RESOURCES[job.device]


def _resources(job: Job) -> dict[str, str]:
    name = _resource(job)
    cards = {} if name is None else {name: str(job.config.cluster.cards_per_node)}
    return cards | job.config.cluster.kubernetes.requests


def _volumes(job: Job) -> list[Volume]:
    """The files of the launch, the user's folders, shared memory, and the driver of the machine."""
    config = Volume("files", str(CONFIG_MOUNT), "configMap", {"name": f"npu-rec-{job.label}"}, read_only=True)
    mounts = [
        Volume(f"mount-{i}", path, *_source(source))
        for i, (path, source) in enumerate(job.config.cluster.kubernetes.mounts.items())
    ]
    memory = Volume("shared-memory", "/dev/shm", "emptyDir", {"medium": "Memory"})
    drivers = [
        Volume(f"ascend-{Path(path).name}", path, "hostPath", {"path": path}, read_only=True)
        for path in (_DRIVER if job.device == "ascend" else ())
    ]
    return [config, *mounts, memory, *drivers]


def _source(text: str) -> tuple[str, dict[str, Any]]:
    """`claim:NAME`, `host:/FOLDER` or `nfs:SERVER:/FOLDER` as a Kubernetes volume."""
    kind, _, rest = text.partition(":")
    if kind == "claim":
        return "persistentVolumeClaim", {"claimName": rest}
    if kind == "host":
        return "hostPath", {"path": rest}
    server, _, path = rest.partition(":")
    return "nfs", {"server": server, "path": path}
