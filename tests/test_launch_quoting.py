"""Values that a shell, YAML or Kubernetes would read as something else arrive as they are."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from launch_programs import in_place_of_torchrun

from npu_rec.config import PACKAGED_CONFIGS, load_config
from npu_rec.errors import ConfigError
from npu_rec.launching import SCHEDULERS, render_launch
from npu_rec.launching.place import main as place

SHIPPED = sorted(
    path for path in PACKAGED_CONFIGS.rglob("*.yaml") if path.parent.name != "scaling"
)  # those are studies
CONFIG = REPOSITORY / "tests" / "golden" / "launch" / "cpu.config.yaml"
ODD = 'it\'s "$HOME" `id` $(id); & | * ~ # \\ é 数 😀: {x} %j'
SHOWS = """
printf '%s\\0' "$@" >arguments
printf %s "$VALUE" >value
"""


def override(key: str, value: object) -> str:
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}"


def files(scheduler: str, *overrides: str, run_dir: Path | None = None, config: Path = CONFIG) -> list[str]:
    plan = render_launch(
        load_config(config, list(overrides)), config, scheduler=scheduler, overrides=overrides, run_dir=run_dir
    )
    return list(plan.files.values())


def run(script: str, folder: Path, **variables: str) -> None:
    """With the python3 in `folder`."""
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | variables
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def arguments(folder: Path) -> list[str]:
    return (folder / "arguments").read_text().split("\0")[:-1]


def test_torchrun(tmp_path: Path) -> None:
    """The folder of the job, variables, the run directory and overrides, one of them with two lines."""
    in_place_of_torchrun(tmp_path, SHOWS)
    folder = tmp_path / ODD
    folder.mkdir()
    overrides = (
        override("cluster.workdir", str(folder)),
        override("cluster.env", {"VALUE": ODD}),
        "data.options.a=\"$HOME 'x'\n`id`; \\\\\"",
        "cluster.nodes=1",
        "cluster.hosts=[]",
    )
    (script,) = files("torchrun", *overrides, run_dir=Path(ODD))
    run(script, tmp_path)
    given = arguments(folder)
    assert [given[i + 1] for i, word in enumerate(given) if word == "--set"] == list(overrides)
    assert given[given.index("--run-dir") + 1] == ODD
    assert (folder / "value").read_text() == ODD


def test_volcano(tmp_path: Path) -> None:
    """Names that are no text in YAML, folders, and the configuration, with what it has for several lines."""
    in_place_of_torchrun(tmp_path, SHOWS)
    source = "on: [a]\n  - 'b' \x85 \u2028 \t" + ODD
    words = ["null", "1e3", "0x10", "~", "yes", "  a", "# a", "a\x85b\u2028c", source]
    config, job = yaml.safe_load_all(
        files(
            "volcano",
            "name='No'",
            "cluster.kubernetes.namespace='123'",
            "cluster.kubernetes.queue='null'",
            "cluster.kubernetes.pull_secret='1e3'",
            "cluster.kubernetes.requests={cpu: 1e3, memory: 0x10}",
            override("cluster.workdir", f"/shared/{ODD}"),
            override("cluster.kubernetes.mounts", {f"/shared/{ODD}": f"host:/srv/{ODD}"}),
            override("cluster.env", {"VALUE": ODD}),
            override("data.options.words", words),
            override("data.source", source),
        )[0]
    )
    assert (job["metadata"]["name"], job["metadata"]["namespace"], job["spec"]["queue"]) == ("no", "123", "null")
    assert config["metadata"] == {"name": "npu-rec-no", "namespace": "123"}
    pod = job["spec"]["tasks"][0]["template"]["spec"]
    assert pod["imagePullSecrets"] == [{"name": "1e3"}]
    (container,) = pod["containers"]
    assert container["workingDir"] == container["volumeMounts"][2]["mountPath"] == f"/shared/{ODD}"
    assert pod["volumes"][2]["hostPath"] == {"path": f"/srv/{ODD}"}
    assert all(isinstance(value, str) for value in container["resources"]["requests"].values())

    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    data = load_config(tmp_path / "config.yaml").data
    assert (data.options["words"], str(data.source)) == (words, source)

    script = f"cd {tmp_path}\n{config['data']['start.sh']}"
    run(script, tmp_path, VC_TASK_INDEX="0", VC_WORKER_HOSTS="a,b")
    assert (tmp_path / "value").read_text() == ODD
    assert f"/shared/{ODD}/runs/No" in arguments(tmp_path)


@pytest.mark.parametrize(
    ("name", "label"),
    [("A_b.c--D", "a-b-c-d"), ("x" * 40, "x" * 40), ("a" + "-_." * 30, "a"), ("x" * 41, None), ("7up", None)],
)
def test_names_of_runs_become_names_of_kubernetes(name: str, label: str | None) -> None:
    if label is None:
        with pytest.raises(ConfigError, match="is no name of a job there: a letter first, at most 40 characters"):
            files("volcano", f"name={name}")
        return
    _, job = yaml.safe_load_all(files("volcano", f"name={name}")[0])
    assert job["metadata"]["name"] == label
    assert f"/shared/npu-rec/runs/{name} " in files("volcano", f"name={name}")[0]


def test_modelarts() -> None:
    """What is after `--user-command` is read by a shell."""
    url = 'obs://bucket/a/it\'s"$HOME"&`id`'
    plan = render_launch(
        load_config(CONFIG, [override("cluster.modelarts.code_url", url)]),
        CONFIG,
        scheduler="modelarts",
        run_dir=Path("/mnt") / ODD,
    )
    submission = plan.commands[-1]
    command = submission[submission.index("--user-command") + 1]
    assert shlex.split(command)[1].endswith('/it\'s"$HOME"&`id`/boot.sh')
    assert shlex.quote(f"/mnt/{ODD}") in next(iter(plan.files.values()))


def test_an_address_from_a_rank_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The start script evaluates what this prints; a server's id is any text."""
    device = '{"device_id": "0", "device_ip": "192.168.1.1", "rank_id": "0"}'
    (tmp_path / "hccl.json").write_text(
        '{"status": "completed", "version": "1.0", "server_count": "1", '
        f'"server_list": [{{"server_id": "$(id); x", "device": [{device}]}}]}}'
    )
    place(str(tmp_path / "hccl.json"), str(tmp_path / "copy.json"), "$(id); x")
    assert shlex.split(capsys.readouterr().out) == ["MASTER_ADDR=$(id); x", "NODE_RANK=0"]


CLUSTER = (
    "cluster.image=a:1",
    "cluster.workdir=/shared/x",
    "cluster.kubernetes.mounts={/shared: 'claim:a'}",
    "cluster.modelarts={flavor: a, code_url: 'obs://a/b/'}",
    "cluster.cards_per_node=1",
)


def without_cluster(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.model_dump().items() if key != "cluster"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_configurations_of_the_package(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each scheduler, on one card; what a container gets says the same as the file."""
    monkeypatch.chdir(tmp_path)
    name = f"configs/{path.relative_to(PACKAGED_CONFIGS)}"
    overrides = [*CLUSTER, "cluster.nodes=1", "cluster.hosts=[]", "parallel.context=1", "embedding.replicas=1"]
    config = load_config(name, overrides)
    for scheduler in SCHEDULERS:
        if scheduler == "ascendjob" and config.device.backend in ("cpu", "cuda"):
            continue
        run_dir = Path("/mnt/run") if scheduler == "modelarts" else None
        plan = render_launch(config, name, scheduler=scheduler, overrides=overrides, run_dir=run_dir)
        if scheduler in ("torchrun", "slurm"):
            (text,) = plan.files.values()
            assert f"-m npu_rec train {name} " in text
            continue
        texts = list(plan.files.values())
        frozen = texts[1] if scheduler == "modelarts" else next(yaml.safe_load_all(texts[0]))["data"]["config.yaml"]
        Path("frozen.yaml").write_text(frozen)
        assert without_cluster(load_config("frozen.yaml")) == without_cluster(config)


def test_bases_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers get what was composed here; torchrun and Slurm compose the file where they run."""
    monkeypatch.setenv("EVENTS", "/data/it's here")
    (tmp_path / "base.yaml").write_text("train: {epochs: 7}\ndevice: {backend: cpu}\n")
    path = tmp_path / "a.yaml"
    path.write_text("name: a\nbase: base.yaml\ndata: {source: '${EVENTS}'}\n")
    config, _ = yaml.safe_load_all(files("volcano", *CLUSTER, config=path)[0])
    assert yaml.safe_load(config["data"]["config.yaml"]) == {
        "name": "a",
        "device": {"backend": "cpu"},
        "data": {"source": "/data/it's here"},
        "train": {"epochs": 7},
    }
    (script,) = files("slurm", config=path)
    assert "EVENTS" not in script
    assert f"train {path} " in script
