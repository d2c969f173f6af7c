"""A wrong `cluster:` section, option or machine is one clear line and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from launch_programs import program
from typer.testing import CliRunner

from npu_rec.cli import app, main
from npu_rec.config import load_config
from npu_rec.errors import TrainingError, UserError
from npu_rec.launching import render_launch, submit
from npu_rec.launching.job import Launch
from npu_rec.launching.torchrun import is_this_machine

CONFIG = "tests/golden/launch/ascend.config.yaml"


def complaint(
    scheduler: str, *overrides: str, config: str = CONFIG, run_dir: str | None = None, node_rank: int | None = None
) -> str:
    """The line that a launch ends with."""
    with pytest.raises(UserError) as raised:
        render_launch(
            load_config(config, list(overrides)),
            config,
            scheduler=scheduler,
            overrides=overrides,
            run_dir=Path(run_dir) if run_dir else None,
            node_rank=node_rank,
        )
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("cluster.nodes=0", "cluster.nodes: Input should be greater than or equal to 1 (given: 0)"),
        ("cluster.envs={}", "cluster.envs: unknown key; did you mean `cluster.env`?"),
        ("cluster.slurm.gpus=8", "cluster.slurm.gpus: unknown key; did you mean `cluster.slurm.cpus`?"),
        (
            "cluster.hosts=[10.0.0.11, 10.0.0.11]",
            "cluster.hosts: 10.0.0.11 is there twice, as node 0 and node 1 (given: ['10.0.0.11', '10.0.0.11'])",
        ),
        ("cluster.hosts=[10.0.0.11]", "cluster: hosts names 1 of the machines, but nodes is 2"),
        (
            "cluster.workdir=here",
            "cluster.workdir: must be an absolute path: it holds on every machine (given: 'here')",
        ),
        ("cluster.interface='=eth0'", "cluster.interface: must be the name of one interface, as eth0 (given: '=eth0')"),
        (
            "cluster.image=a b",
            "cluster.image: must be one word of letters, digits and . _ / @ : - (given: 'a b')",
        ),
        (
            "cluster.master_port=80",
            "cluster.master_port: Input should be greater than or equal to 1024 (given: 80)",
        ),
        ("cluster.slurm.time=soon", "cluster.slurm.time: must be a time as 12:00:00 or 1-00:00:00 (given: 'soon')"),
        (
            "cluster.slurm.directives=[constraint=910b]",
            "cluster.slurm.directives: 'constraint=910b' is no option of sbatch; write it as --constraint=910b "
            "(given: ['constraint=910b'])",
        ),
        (
            "cluster.kubernetes.namespace=Mine",
            "cluster.kubernetes.namespace: must be small letters, digits and hyphens, at most 63 (given: 'Mine')",
        ),
        (
            "cluster.kubernetes.mounts={data: 'claim:x'}",
            "cluster.kubernetes.mounts: 'data' is no absolute path in the container",
        ),
        (
            "cluster.kubernetes.mounts={/data: events}",
            "cluster.kubernetes.mounts: /data: 'events' is none of claim:NAME, host:/FOLDER, nfs:SERVER:/FOLDER",
        ),
        (
            "cluster.modelarts.code_url=s3://bucket/a",
            "cluster.modelarts.code_url: must be a folder in OBS, as obs://BUCKET/FOLDER/ (given: 's3://bucket/a')",
        ),
        (
            "cluster.env={HCCL_CONNECT_TIMOUT: 300}",
            "cluster.env: unknown variable HCCL_CONNECT_TIMOUT; did you mean HCCL_CONNECT_TIMEOUT? (if it is right all "
            "the same, export it in cluster.setup)",
        ),
        (
            "cluster.env={PYTORCH_NPU_WHATEVER: x}",
            "cluster.env: unknown variable PYTORCH_NPU_WHATEVER; (if it is right all the same, export it in "
            "cluster.setup)",
        ),
        (
            "cluster.env={HCCL_CONNECT_TIMEOUT: 60}",
            "cluster.env: HCCL_CONNECT_TIMEOUT must be a whole number from 120 to 7200, not '60'",
        ),
        (
            "cluster.env={HCCL_EXEC_TIMEOUT: never}",
            "cluster.env: HCCL_EXEC_TIMEOUT must be a whole number from 0 to 2147483647, not 'never'",
        ),
        (
            "cluster.env={HCCL_IF_IP: 10.0.0.1}",
            "cluster: env: HCCL_IF_IP is the address of one machine; set cluster.interface instead",
        ),
        ("cluster.env={MASTER_ADDR: a}", "cluster.env: MASTER_ADDR is not set here: torchrun sets it"),
        (
            "cluster.env={RANK_TABLE_FILE: /a}",
            "cluster.env: RANK_TABLE_FILE is not set here: set cluster.rank_table",
        ),
        ("cluster.env={1A: a}", "cluster.env: '1A' is no name of an environment variable"),
        (
            "cluster.env={PYTORCH_NPU_ALLOC_CONF: a, PYTORCH_ALLOC_CONF: b}",
            "cluster.env: PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF exclude each other",
        ),
        (
            'cluster.env={A: "a\\nb"}',
            "cluster.env: the value of A has more than one line, or control characters",
        ),
        (
            'cluster.setup=["a\\nb"]',
            "cluster.setup[0]: it has more than one line, or control characters (given: 'a\\nb')",
        ),
        (
            'cluster.kubernetes.mounts={/a: "host:/b\\ec"}',
            r"cluster.kubernetes.mounts: '/a': 'host:/b\x1bc' has control characters",
        ),
        (
            "cluster.env={ASCEND_RT_VISIBLE_DEVICES: 0}",
            "cluster.env: ASCEND_RT_VISIBLE_DEVICES is not set here: the scheduler, or the shell that starts torchrun, "
            "chooses the cards",
        ),
        (
            "cluster.env={CUDA_VISIBLE_DEVICES: 0}",
            "cluster.env: CUDA_VISIBLE_DEVICES is not set here: the scheduler, or the shell that starts torchrun, "
            "chooses the cards",
        ),
        ("cluster.env={RANK: 0}", "cluster.env: RANK is not set here: torchrun sets it"),
        ("cluster.env={VC_TASK_INDEX: 0}", "cluster.env: VC_TASK_INDEX is not set here: the scheduler sets it"),
        (
            "cluster.env={PET_NNODES: 3}",
            "cluster.env: PET_NNODES is not set here: the scheduler or torchrun sets it",
        ),
        (
            "cluster.env={PATH: /a}",
            "cluster.env: PATH is not set here: its value is taken as it stands; export it in cluster.setup, where "
            "$PATH is the PATH before",
        ),
    ],
)
def test_what_is_wrong_by_itself(override: str, line: str) -> None:
    assert complaint("slurm", override) == f"--set: {line}"


@pytest.mark.parametrize(
    ("scheduler", "override", "line"),
    [
        (
            "volcano",
            "cluster.image=null",
            "cluster.image: is not set: a pod needs an image with npu-rec (launch/images)",
        ),
        (
            "ascendjob",
            "cluster.image=null",
            "cluster.image: is not set: a pod needs an image with npu-rec (launch/images)",
        ),
        (
            "modelarts",
            "cluster.image=null",
            "cluster.image: is not set: ModelArts needs the address of an image with npu-rec in SWR (launch/images)",
        ),
        (
            "modelarts",
            "cluster.modelarts.flavor=null",
            "cluster.modelarts.flavor: is not set: ModelArts needs a machine type; `ma-cli ma-job get-flavor` lists "
            "them",
        ),
        (
            "modelarts",
            "cluster.modelarts.code_url=null",
            "cluster.modelarts.code_url: is not set: ModelArts needs an OBS folder for the start script, "
            "obs://BUCKET/FOLDER",
        ),
        (
            "torchrun",
            "cluster.hosts=[]",
            "cluster.hosts: torchrun on 2 machines needs their addresses, first that of rank 0",
        ),
        (
            "slurm",
            "parallel.context=3",
            "parallel.context: 2 nodes x 8 cards = 16 ranks cannot be divided by 3",
        ),
        (
            "torchrun",
            "embedding.replicas=5",
            "embedding.replicas: 2 nodes x 8 cards = 16 ranks cannot be divided by 5",
        ),
        (
            "ascendjob",
            "cluster.cards_per_node=3",
            "cluster.cards_per_node: 3 cards a pod do not divide the 8 of accelerator_type module-910b-8 "
            "(cluster.kubernetes)",
        ),
        (
            "ascendjob",
            "device.backend=cpu",
            "device.backend: cpu: an AscendJob has NPUs; --scheduler volcano runs on anything",
        ),
        (
            "ascendjob",
            "cluster.kubernetes.rank_table=controller",
            "cluster.kubernetes.rank_table: the Ascend Operator numbers the ranks of an AscendJob itself; leave it out",
        ),
        (
            "volcano",
            "cluster.workdir=null",
            "cluster.workdir: is not set, so --run-dir must be absolute in the container, not runs/shop-ascend",
        ),
        (
            "volcano",
            "name='9'",
            "name: '9' is no name of a job there: a letter first, at most 40 characters",
        ),
        (
            "slurm",
            "cluster.rank_table=hccl.json",
            "cluster.rank_table: HCCL wants the full path, not hccl.json",
        ),
    ],
)
def test_what_does_not_fit_the_scheduler(scheduler: str, override: str, line: str) -> None:
    run_dir = "/mnt/sfs/run" if scheduler == "modelarts" else None
    assert complaint(scheduler, override, run_dir=run_dir) == f"--set: {line}"


def test_the_file_of_a_wrong_key_is_named() -> None:
    assert complaint("volcano", "cluster.kubernetes.accelerator_type=card-910b-2") == (
        f"{CONFIG}: cluster.cards_per_node: 8 cards a pod do not divide the 2 of accelerator_type card-910b-2 "
        "(cluster.kubernetes)"
    )


def test_a_run_directory_that_would_be_lost() -> None:
    assert complaint("ascendjob", run_dir="/tmp/run") == (
        f"{CONFIG}: cluster.kubernetes.mounts: the run directory /tmp/run is below none of them (/shared, /data) and "
        "would be lost with its pod"
    )
    assert "the run directory /tmp/run is below none of them" in complaint("volcano", run_dir="/shared/../tmp/run")
    assert complaint("modelarts", run_dir="runs/x") == (
        "--run-dir runs/x: ModelArts needs an absolute folder that outlives the container, such as a mount of SFS Turbo"
    )


def test_options_that_are_wrong() -> None:
    assert complaint("k8s") == "--scheduler k8s: there are torchrun, slurm, volcano, ascendjob, modelarts"
    assert complaint("slurm", node_rank=0) == (
        "--node-rank is for --scheduler torchrun; others number the nodes themselves"
    )
    assert complaint("torchrun", node_rank=2) == "--node-rank 2: cluster.nodes is 2, so it is 0 to 1"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--scheduler", "volcano", "--set", "cluster.image=null"],
            "--set: cluster.image: is not set: a pod needs an image with npu-rec (launch/images)",
        ),
        (
            ["--scheduler", "slurm", "--resume", "runs/a/checkpoints/step-1"],
            "--resume runs/a/checkpoints/step-1: restarts would go back to it; start a run of its own with "
            "train.init_from",
        ),
        (
            ["--scheduler", "slurm", "--run-dir", "a\nb"],
            "--run-dir 'a\\nb': has more than one line, or control characters",
        ),
        (
            ["--scheduler", "slurm"],
            "cluster.workdir /shared/npu-rec: is no folder of this machine; all machines must see it",
        ),
    ],
)
def test_the_command_ends_with_code_2(
    options: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["npu-rec", "launch", CONFIG, *options])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_the_configuration_must_be_the_one_that_the_job_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, shared = tmp_path / "here", tmp_path / "shared"
    here.mkdir()
    shared.mkdir()
    monkeypatch.chdir(here)
    Path("a.yaml").write_text(f"name: a\ncluster: {{workdir: {shared}, cards_per_node: 1}}\n")
    assert complaint("slurm", config="a.yaml") == (
        f"a.yaml: cluster.workdir: {shared} has no a.yaml, which the job would train with; copy it there"
    )
    (shared / "a.yaml").write_text("name: another\n")
    different = f"{shared}/a.yaml, which the job would train with, says something else than a.yaml here"
    assert complaint("torchrun", config="a.yaml") == f"a.yaml: cluster.workdir: {different}"
    (shared / "a.yaml").write_text(f"# The same.\n{Path('a.yaml').read_text()}")
    render_launch(load_config("a.yaml"), "a.yaml", scheduler="slurm")

    for folder, epochs in ((here, 3), (shared, 4)):  # a file that the two have as their base
        (folder / "base.yaml").write_text(f"train: {{epochs: {epochs}}}\n")
        (folder / "a.yaml").write_text(f"base: base.yaml\ncluster: {{workdir: {shared}}}\n")
    assert complaint("slurm", config="a.yaml") == f"a.yaml: cluster.workdir: {different}"
    render_launch(load_config("a.yaml", ["train.epochs=5"]), "a.yaml", scheduler="slurm", overrides=["train.epochs=5"])


def test_a_configuration_of_the_package_is_found_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is a file of the repository; there, the package's, unless a file of that name is another one."""
    workdir = f"cluster.workdir={tmp_path}"
    render_launch(
        load_config("configs/quickstart.yaml", [workdir]),
        "configs/quickstart.yaml",
        scheduler="slurm",
        overrides=[workdir],
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("name: another\n")
    monkeypatch.chdir("/")
    assert "says something else than configs/quickstart.yaml here" in complaint(
        "torchrun", workdir, config="configs/quickstart.yaml"
    )


def test_a_path_to_which_slurm_writes_no_log() -> None:
    assert complaint("slurm", run_dir="a\\b") == (
        "/shared/npu-rec/a\\b/launch: Slurm can write no log to a path with a backslash"
    )


def test_which_host_this_machine_is() -> None:
    assert is_this_machine("127.0.0.1")
    assert is_this_machine("localhost")
    assert not is_this_machine("198.51.100.1")  # reserved for documentation
    assert not is_this_machine("no-such-host.invalid")
    assert "none of cluster.hosts (198.51.100.1, 198.51.100.2) lead to this machine" in complaint(
        "torchrun", "cluster.hosts=[198.51.100.1, 198.51.100.2]"
    )
    assert "2 of cluster.hosts (127.0.0.1, localhost) lead to this machine" in complaint(
        "torchrun", "cluster.hosts=[127.0.0.1, localhost]"
    )
    assert "none of cluster.hosts (198.51.100.1) lead to this machine" in complaint(
        "torchrun", "cluster.nodes=1", "cluster.hosts=[198.51.100.1]"
    )
    found = render_launch(
        load_config(CONFIG, ["cluster.hosts=[198.51.100.1, 127.0.0.1]"]), "configs/base.yaml", scheduler="torchrun"
    )
    assert "--node-rank=1 " in found.shown()


@pytest.mark.parametrize(
    ("scheduler", "program"), [("slurm", "sbatch"), ("volcano", "kubectl"), ("modelarts", "ma-cli")]
)
def test_a_missing_program_is_one_line(
    scheduler: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    workdir = f"cluster.workdir={tmp_path}"
    mount = f"cluster.kubernetes.mounts={{{tmp_path}: 'claim:a'}}"
    plan = render_launch(load_config(CONFIG, [workdir, mount]), "/a.yaml", scheduler=scheduler, run_dir=tmp_path)
    with pytest.raises(UserError, match=rf"^{program} is not on the PATH: .*--dry-run$"):
        submit(plan)


def test_the_files_are_written_and_the_scheduler_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this interpreter's folder first on the PATH, wherever that was."""
    program(tmp_path, "sbatch", '#!/bin/sh\ntest -f "$1" && echo "Submitted batch job 7 with $PATH"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, ["launch", "configs/quickstart.yaml", "--scheduler", "slurm", "--json"], catch_exceptions=False
    )
    document = json.loads(done.stdout)
    script = tmp_path / "runs/quickstart/launch/slurm.sh"
    assert document["answer"] == (
        f"Submitted batch job 7 with {Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert document["commands"] == [["sbatch", str(script)]]
    assert document["files"] == {str(script): script.read_text()}


def test_a_refusal_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(TrainingError, match="sbatch ended with exit code 1: sbatch: error: invalid partition"):
        submit(Launch({}, [["sbatch", "a.sh"]]))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)|cannot be written \(File exists\)"):
        submit(Launch({tmp_path / "file" / "launch" / "a.sh": ""}, [["true"]]))
