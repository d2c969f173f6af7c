"""What `npu-rec launch --dry-run` prints is checked in; its scripts pass shellcheck, its manifests fit their schemas.

After a change that is meant: `NPU_REC_REWRITE=1 .venv/bin/python -m pytest tests/test_launch_golden.py`, then read the
difference.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import REPOSITORY
from typer.testing import CliRunner

from npu_rec.cli import app

GOLDEN = REPOSITORY / "tests" / "golden" / "launch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
MODELARTS = ["--run-dir", "/mnt/sfs/runs/shop"]
QUOTED = ["--set", "train.betas=[0.9, 0.95]", "--set", "task.options.negatives=popularity"]

# name of the golden file -> configuration, scheduler, options
CASES: dict[str, tuple[str, str, list[str]]] = {
    "torchrun.ascend.sh": ("ascend", "torchrun", ["--node-rank", "1", *QUOTED]),
    "torchrun.cuda.sh": ("cuda", "torchrun", []),
    "torchrun.cpu.sh": ("cpu", "torchrun", ["--node-rank", "0", "--run-dir", "/shared/runs/a folder"]),
    "slurm.ascend.sh": ("ascend", "slurm", QUOTED),
    "slurm.cuda.sh": ("cuda", "slurm", []),
    "slurm.cpu.sh": ("cpu", "slurm", []),
    "volcano.ascend.yaml": ("ascend", "volcano", QUOTED),
    "volcano.ascend-controller.yaml": ("ascend", "volcano", ["--set", "cluster.kubernetes.rank_table=controller"]),
    "volcano.cuda.yaml": ("cuda", "volcano", []),
    "volcano.cpu.yaml": ("cpu", "volcano", []),
    "ascendjob.ascend.yaml": ("ascend", "ascendjob", QUOTED),
    "ascendjob.one-node.yaml": ("ascend", "ascendjob", ["--set", "cluster.nodes=1", "--set", "cluster.hosts=[]"]),
    "modelarts.ascend.txt": ("ascend", "modelarts", [*MODELARTS, *QUOTED]),
    "modelarts.cpu.txt": ("cpu", "modelarts", MODELARTS),
}
each_case = pytest.mark.parametrize("name", CASES)


def arguments_of(name: str) -> list[str]:
    config, scheduler, options = CASES[name]
    return ["launch", f"tests/golden/launch/{config}.config.yaml", "--scheduler", scheduler, *options, "--dry-run"]


@each_case
def test_dry_run_is_the_golden_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    done = CliRunner().invoke(app, arguments_of(name), catch_exceptions=False)
    assert done.exit_code == 0
    if os.environ.get("NPU_REC_REWRITE"):
        (GOLDEN / name).write_text(done.stdout)
    assert done.stdout == (GOLDEN / name).read_text()


def test_every_golden_file_has_a_case() -> None:
    assert {path.name for path in GOLDEN.iterdir() if ".config." not in path.name} == set(CASES)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((GOLDEN / name).read_text()))


def scripts(name: str) -> list[str]:
    """The shell scripts in a golden file."""
    text = (GOLDEN / name).read_text()
    if name.endswith(".sh"):
        return [text]
    if name.endswith(".txt"):
        return re.findall(r"^# ---- \S+\.sh\n(.*?)(?=^# ---- )", text, re.MULTILINE | re.DOTALL)
    return [script for document in documents(name) for script in [document.get("data", {}).get("start.sh")] if script]


@each_case
def test_scripts_pass_shellcheck(name: str) -> None:
    found = scripts(name)
    assert found
    for script in found:  # SC1091: a file that `cluster.setup` sources is not on this machine
        done = subprocess.run(
            [SHELLCHECK, "--exclude=SC1091", "-"], input=script, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout


@each_case
def test_no_script_ends_processes_by_name(name: str) -> None:
    assert not re.search(r"\b(pkill|killall|pgrep|pidof)\b", (GOLDEN / name).read_text())


AS_CORE = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
CUSTOM = {"AscendJob": "ascendjob.schema.json", "Job": "volcano.schema.json"}
manifests = pytest.mark.parametrize("name", [name for name in CASES if name.endswith(".yaml")])


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Templates of the pods of a job."""
    spec = document["spec"]
    groups = spec["tasks"] if document["kind"] == "Job" else spec["replicaSpecs"].values()
    return [group["template"] for group in groups]


@manifests
def test_manifests_fit_their_schemas(name: str) -> None:
    kinds = [document["kind"] for document in documents(name)]
    assert set(kinds) <= {"ConfigMap", *CUSTOM}
    for document in documents(name):
        if document["kind"] == "ConfigMap":
            kubernetes_validate.validate(document, "1.30", strict=True)
            continue
        schema = json.loads((REPOSITORY / "tests" / CUSTOM[document["kind"]]).read_text())
        jsonschema.Draft202012Validator(schema).validate(document)
        for template in pods(document):
            pod = AS_CORE | {"spec": template["spec"]}
            kubernetes_validate.validate(pod, "1.30", strict=True)


@manifests
def test_manifests_hold_together(name: str) -> None:
    """Volumes exist, ConfigMaps that are mounted are in the file, limits equal requests, pods add up to the nodes."""
    *configs, job = documents(name)
    names = {document["metadata"]["name"] for document in configs}
    assert {document["metadata"]["namespace"] for document in [*configs, job]} == {job["metadata"]["namespace"]}
    for template in pods(job):
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert [mount["name"] for mount in container["volumeMounts"]] == list(volumes)
        assert {v["configMap"]["name"] for v in volumes.values() if "configMap" in v} == names
        resources = container.get("resources")
        assert resources is None or resources["requests"] == resources["limits"]
    spec = job["spec"]
    if job["kind"] == "Job":
        assert [task["replicas"] for task in spec["tasks"]] == [spec["minAvailable"]]
    else:
        replicas = [group["replicas"] for group in spec["replicaSpecs"].values()]
        assert sum(replicas) == spec["runPolicy"]["schedulingPolicy"]["minAvailable"]


@pytest.mark.parametrize(
    ("schema", "wrong"),
    [
        ("ascendjob.schema.json", {"metadata": {"name": "a", "labels": {"framework": "tensorflow"}}}),
        ("ascendjob.schema.json", {"spec": {"replicaSpecs": {}}}),
        ("volcano.schema.json", {"apiVersion": "batch/v1"}),
        ("volcano.schema.json", {"spec": {"schedulerName": "volcano", "minAvailable": 0, "tasks": []}}),
    ],
)
def test_the_schemas_refuse_what_is_wrong(schema: str, wrong: dict[str, Any]) -> None:
    name = "ascendjob.ascend.yaml" if schema.startswith("ascend") else "volcano.ascend.yaml"
    validator = jsonschema.Draft202012Validator(json.loads((REPOSITORY / "tests" / schema).read_text()))
    document = documents(name)[-1]
    assert validator.is_valid(document)
    assert not validator.is_valid(document | wrong)
