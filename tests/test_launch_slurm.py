"""`npu-rec launch --scheduler slurm` on a real Slurm with two nodes: the script it writes trains, fails and resumes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_programs import FATAL, in_place_of_torchrun
from slurm_cluster import SlurmCluster, slurm_cluster
from train_ranks import Job, column, run_jobs, worst

from npu_rec.config import load_config
from npu_rec.launching import render_launch

# In the place of torchrun: says where it runs and with which devices, and waits for the file `go` of its folder.
SHOW = """
echo "at $SLURMD_NODENAME: $ASCEND_RT_VISIBLE_DEVICES"
until [ -e "$(dirname "$0")/go" ]; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as running:
        yield running


OPTIONS = ("cluster.nodes=2", "cluster.cards_per_node=1", "cluster.slurm.gres=npu")


def launch(cluster: SlurmCluster, shop: Path, folder: Path, *options: str) -> str:
    """The number of the job that `npu-rec launch` starts, from an environment that is not activated."""
    command = [sys.executable, "-m", "npu_rec", "launch", shop, "--scheduler", "slurm", "--run-dir", folder / "run"]
    command += [word for option in (*OPTIONS, *options) for word in ("--set", option)]
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != Path(sys.executable).parent]
    answer = cluster.output(*command, cwd=folder, PATH=os.pathsep.join(folders))
    return answer.strip().removeprefix("Submitted batch job ")


def rendered(shop: Path, folder: Path, *options: str, run_dir: str = "run") -> str:
    """The script that `launch` submits."""
    options = (*OPTIONS, f"cluster.workdir={json.dumps(str(folder))}", *options)
    plan = render_launch(
        load_config(shop, list(options)), shop, scheduler="slurm", overrides=options, run_dir=Path(run_dir)
    )
    (text,) = plan.files.values()
    return text


def log(folder: Path, number: str) -> str:
    return (folder / "run" / "launch" / f"slurm-{number}.log").read_text()


def test_two_nodes_train_as_one_process_though_a_rank_dies(cluster: SlurmCluster, shop: Path, tmp_path: Path) -> None:
    """The job fails with the rank, and goes on when it is queued anew."""
    alone = tmp_path / "alone"
    run_jobs([Job(str(shop), str(alone), ())])
    (tmp_path / "fatal.py").write_text(FATAL)
    task = ("imports=[fatal]", "task.name=fatal", "train.checkpoint_every=2")
    number = launch(cluster, shop, tmp_path, *task, "cluster.max_restarts=0")
    job = cluster.ended(number)
    text = log(tmp_path, number)
    assert (job["JobState"], job["ExitCode"], job["NodeList"]) == ("FAILED", "1:0", "n[1-2]"), text
    assert "node 0: n1, devices 0" in text
    assert "node 1: n2, devices 0" in text
    assert "8 steps on cpu, 2 processes" in text
    assert "srun: error: n2: task 1: Exited with exit code 1" in text

    cluster.requeue(number)
    job = cluster.ended(number)
    text = log(tmp_path, number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    assert "resumed from step 4" in text
    assert worst(column(tmp_path / "run", "loss"), column(alone, "loss")) < 1e-5


class Pretended:
    """Jobs of the script for Ascend, with SHOW in the place of torchrun."""

    def __init__(self, cluster: SlurmCluster, script: str, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "job.sh").write_text(script)
        in_place_of_torchrun(folder, SHOW)

    def submit(self, *options: str) -> str:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return self.cluster.submit("--output=%j.log", *options, "job.sh", cwd=self.folder, PATH=path)

    def shown(self, number: str, count: int) -> list[str]:
        """What the job's tasks have said, as soon as there are `count` lines."""
        log, end = self.folder / f"{number}.log", time.monotonic() + 60
        while True:
            text = log.read_text() if log.exists() else ""
            lines = [line.removeprefix("at ") for line in text.splitlines() if line.startswith("at ")]
            if len(lines) == count:
                return sorted(lines)
            assert time.monotonic() < end, f"{text}\n{self.cluster.logs()}"
            time.sleep(0.05)

    def go(self) -> None:
        """Let the jobs end."""
        (self.folder / "go").touch()


@pytest.fixture(scope="module")
def script(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return rendered(shop, tmp_path_factory.mktemp("ascend"), "device.backend=ascend", "cluster.slurm.cpus=1")


def test_a_process_sees_the_devices_that_slurm_granted(cluster: SlurmCluster, script: str, tmp_path: Path) -> None:
    """Three jobs that share the nodes: a card of n1; then one of both nodes; then, when these have ended, all cards."""
    jobs = Pretended(cluster, script, tmp_path)
    one = jobs.submit("--nodes=1", "--nodelist=n1")
    assert jobs.shown(one, 1) == ["n1: 0"]
    two = jobs.submit()
    assert jobs.shown(two, 2) == ["n1: 1", "n2: 0"]
    all_cards = jobs.submit("--gres=npu:2")
    jobs.go()
    assert jobs.shown(all_cards, 2) == ["n1: 0,1", "n2: 0,1"]
    assert [cluster.ended(number)["JobState"] for number in (one, two, all_cards)] == ["COMPLETED"] * 3


def test_a_lost_node_makes_slurm_queue_the_job_anew(cluster: SlurmCluster, script: str, tmp_path: Path) -> None:
    jobs = Pretended(cluster, script, tmp_path)
    number = jobs.submit()
    assert jobs.shown(number, 2) == ["n1: 0", "n2: 0"]
    cluster.lose("n2", number)
    assert jobs.shown(number, 4) == ["n1: 0", "n1: 0", "n2: 0", "n2: 0"]
    jobs.go()
    job = cluster.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")


def test_a_job_without_the_environment_of_sbatch(cluster: SlurmCluster, shop: Path, tmp_path: Path) -> None:
    """`cluster.setup` then says where `python3` is, and the tasks get what the script sets."""
    setup = f'cluster.setup=["export PATH={tmp_path}:$PATH"]'
    jobs = Pretended(cluster, rendered(shop, tmp_path, "cluster.slurm.cpus=1", setup), tmp_path)
    jobs.go()
    number = jobs.submit("--export=NONE")
    assert jobs.shown(number, 2) == ["n1: 0", "n2: 0"]
    assert cluster.ended(number)["JobState"] == "COMPLETED"


def test_names_that_a_shell_would_read_otherwise(cluster: SlurmCluster, shop: Path, tmp_path: Path) -> None:
    """Paths and overrides arrive as they are; so does the log, where Slurm replaces % and shells the rest."""
    folder = tmp_path / "a 'folder' \"of\" $HOME; `id` #1 %x"
    folder.mkdir()
    odd = ["train.betas=[0.9, 0.95]", 'data.options.quote="it\'s $HOME `id`; \\\\ # x\nline: %j"', "imports=[]"]
    in_place_of_torchrun(tmp_path, 'printf "%s\\0" "$@" >"arguments-$SLURM_NODEID"')
    text = rendered(shop, folder, "cluster.nodes=1", *odd, run_dir="runs/é b")
    (folder / "runs/é b/launch").mkdir(parents=True)
    (tmp_path / "job.sh").write_text(text)
    number = cluster.submit("job.sh", cwd=tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cluster.ended(number)["JobState"] == "COMPLETED"
    assert (folder / f"runs/é b/launch/slurm-{number}.log").exists()
    words = (folder / "arguments-0").read_text().split("\0")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--set"][-3:] == odd
    assert words[words.index("--run-dir") + 1] == "runs/é b"
