"""The start scripts at work: with a torchrun that prints its arguments, and with the real one on two made-up nodes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from launch_programs import in_place_of_torchrun

from npu_rec.config import load_config
from npu_rec.launching import render_launch

GOLDEN = REPOSITORY / "tests" / "golden" / "launch"

PRINTS = """
echo "${@:1:6}"
env | grep -E '^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)=' || true
"""
# Its own arguments as they are, but another program instead of `-m npu_rec train ...`.
REAL = """
own=()
while [[ $1 != -m ]]; do own+=("$1"); shift; done
exec {python} -m torch.distributed.run "${{own[@]}}" {program}
"""
PROGRAM = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: node {os.environ['GROUP_RANK']}, total {int(total)}")
dist.destroy_process_group()
"""


def start_script(scheduler: str, *overrides: str, config: str = "ascend") -> str:
    path = GOLDEN / f"{config}.config.yaml"
    run_dir = Path("/mnt/run") if scheduler == "modelarts" else None
    overrides = ("cluster.interface=null", *overrides, "cluster.setup=[]")
    plan = render_launch(
        load_config(path, list(overrides)), path, scheduler=scheduler, overrides=overrides, run_dir=run_dir
    )
    text = next(iter(plan.files.values()))
    if scheduler == "modelarts":
        return text
    return str(next(yaml.safe_load_all(text))["data"]["start.sh"])


def run(script: str, programs: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", script],
        env=kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables,
        cwd=programs,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    in_place_of_torchrun(tmp_path, PRINTS)
    return tmp_path


OPERATOR = {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "2222", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "1"}


def test_the_operators_rank_is_that_of_the_node_and_its_world_size_counts_cards(programs: Path) -> None:
    done = run(start_script("ascendjob"), programs, **OPERATOR, LOCAL_RANK="0,1,2,3,4,5,6,7")
    assert done.returncode == 0, done.stderr
    # ... and the processes do not inherit what torchrun means by these names in another sense
    assert done.stdout == (
        "--nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=10.1.2.3 --master-port=2222 --max-restarts=2\n"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 and LOCAL_WORLD_SIZE=8, but the job was made for 2 x 8 cards"),
        ({"WORLD_SIZE": "17"}, "WORLD_SIZE=17 and LOCAL_WORLD_SIZE=8, but the job was made for 2 x 8 cards"),
        ({"LOCAL_WORLD_SIZE": "4"}, "WORLD_SIZE=16 and LOCAL_WORLD_SIZE=4, but the job was made for 2 x 8 cards"),
        ({"RANK": ""}, "RANK: not set: is this a pod of an AscendJob?"),
    ],
)
def test_an_operator_that_says_something_else(programs: Path, given: dict[str, str], said: str) -> None:
    done = run(start_script("ascendjob"), programs, **(OPERATOR | given))
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stdout == ""


def test_volcano_takes_its_place_from_the_plug_ins(programs: Path) -> None:
    hosts = "shop-ascend-worker-0.shop-ascend,shop-ascend-worker-1.shop-ascend"
    done = run(start_script("volcano"), programs, VC_WORKER_HOSTS=hosts, VC_TASK_INDEX="1")
    assert done.stdout.splitlines()[0] == (
        "--nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=shop-ascend-worker-0.shop-ascend "
        "--master-port=29500 --max-restarts=2"
    )


def test_volcano_takes_its_place_from_a_rank_table(programs: Path) -> None:
    table = programs / "hccl.json"
    table.write_text(
        '{"status": "completed", "version": "1.0", "server_count": "2", "server_list": ['
        '{"server_id": "10.0.0.11", "device": [{"device_id": "0", "device_ip": "192.168.1.1", "rank_id": "1"}]},'
        '{"server_id": "10.0.0.12", "device": [{"device_id": "0", "device_ip": "192.168.1.2", "rank_id": "0"}]}]}'
    )
    script = start_script("volcano", "cluster.kubernetes.rank_table=controller", "cluster.cards_per_node=1")
    script = script.replace("/user/serverid/devindex/config/hccl.json", str(table))
    script = script.replace("/tmp/hccl.json", str(programs / "copy.json"))
    done = run(script, programs, XDL_IP="10.0.0.11", POD_IP="172.16.0.9", PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    assert "--node-rank=1 --nproc-per-node=1 --master-addr=10.0.0.12" in done.stdout
    done = run(script, programs, XDL_IP="10.0.0.99", POD_IP="172.16.0.9", PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 2
    assert "no server has the address 10.0.0.99 or 172.16.0.9 of this pod" in done.stderr


def test_modelarts(programs: Path) -> None:
    script = start_script("modelarts").replace("cd /shared/npu-rec\n", "")
    given = {"MA_NUM_HOSTS": "2", "MA_NUM_GPUS": "8", "VC_TASK_INDEX": "1", "VC_WORKER_HOSTS": "a.ma,b.ma"}
    done = run(script, programs, **given)
    assert done.returncode == 0, done.stderr
    assert "--node-rank=1 --nproc-per-node=8 --master-addr=a.ma" in done.stdout
    done = run(script, programs, **(given | {"MA_NUM_GPUS": "4"}))
    assert done.returncode == 2
    assert "ModelArts gives 2 x 4 cards, but the job was made for 2 x 8" in done.stderr


def test_one_node_with_one_card(programs: Path) -> None:
    alone = ("cluster.nodes=1", "cluster.cards_per_node=1", "cluster.hosts=[]")
    given = {
        "volcano": {"VC_WORKER_HOSTS": "a-worker-0.a", "VC_TASK_INDEX": "0"},
        "modelarts": {"MA_NUM_HOSTS": "1", "MA_NUM_GPUS": "1"},
        "ascendjob": OPERATOR | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"},
    }
    first = {"volcano": "a-worker-0.a", "modelarts": "127.0.0.1", "ascendjob": "10.1.2.3"}
    for scheduler, variables in given.items():
        script = start_script(scheduler, *alone).replace("cd /shared/npu-rec\n", "")
        done = run(script, programs, **variables)
        assert done.stdout.startswith(
            f"--nnodes=1 --node-rank=0 --nproc-per-node=1 --master-addr={first[scheduler]} "
        ), done.stderr


@pytest.mark.parametrize("scheduler", ["volcano", "modelarts"])
def test_a_pod_without_its_scheduler(programs: Path, scheduler: str) -> None:
    script = start_script(scheduler).replace("cd /shared/npu-rec\n", "")
    done = run(script, programs, MA_NUM_HOSTS="2", MA_NUM_GPUS="8")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "VC_TASK_INDEX: not set: is this a" in done.stderr


@pytest.mark.parametrize("interface", ["lo", "lo:1"])  # the second is an alias: an address of lo
def test_an_interface_that_this_machine_has(programs: Path, interface: str) -> None:
    done = run(start_script("ascendjob", f"cluster.interface={interface}"), programs, **OPERATOR)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interface", ["eth99", "l", "l.", "lo.1"])
def test_an_interface_that_this_machine_lacks(programs: Path, interface: str) -> None:
    done = run(start_script("ascendjob", f"cluster.interface={interface}"), programs, **OPERATOR)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    said, _, found = line.partition(" it has ")
    assert re.fullmatch(rf"error: cluster\.interface: \S+ has no {re.escape(interface)},", said)
    assert sorted(found.split()) == sorted(name for _, name in socket.if_nameindex())


def test_an_interface_that_cluster_env_replaces_is_not_looked_for() -> None:
    both = 'cluster.env={GLOO_SOCKET_IFNAME: a, HCCL_SOCKET_IFNAME: "b,c"}'
    assert "/proc/net/dev" not in start_script("ascendjob", "cluster.interface=eth99", both)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_pods_of_an_ascendjob_make_one_process_group(tmp_path: Path) -> None:
    """With the variables that the operator sets, each script starts its half of four real processes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    in_place_of_torchrun(tmp_path, REAL.format(python=sys.executable, program=tmp_path / "program.py"))
    script = start_script("ascendjob", "cluster.cards_per_node=2", "cluster.interface=lo")
    operator = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    done: dict[int, subprocess.CompletedProcess[str]] = {}

    def pod(node: int) -> None:
        done[node] = run(script, tmp_path, **operator, RANK=str(node))

    pods = [threading.Thread(target=pod, args=(node,)) for node in range(2)]
    for each in pods:
        each.start()
    for each in pods:
        each.join()
    assert [done[node].returncode for node in range(2)] == [0, 0], done[0].stderr + done[1].stderr
    said = {node: sorted(re.findall(r"rank \d of \d: node \d, total \d+", done[node].stdout)) for node in range(2)}
    assert said == {
        0: ["rank 0 of 4: node 0, total 10", "rank 1 of 4: node 0, total 10"],
        1: ["rank 2 of 4: node 1, total 10", "rank 3 of 4: node 1, total 10"],
    }


SCONTROL = """
scontrol() {
  [[ "$1 $2" == "show hostnames" ]] || exit 9
  case $3 in "n[1-2]") printf '%s\\n' n1 n2 ;; "n[1-2,40]") printf '%s\\n' n1 n2 n40 ;; *) printf '%s\\n' "$3" ;; esac
}
"""
DETAILS = """JobId=7 JobName=shop
   NodeList=n[1-2] BatchHost=n1
   TRES=cpu=2,node=2,billing=2
   JOB_GRES=npu:4
{lines}
   MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0
"""


@pytest.mark.parametrize(
    ("lines", "node", "devices"),
    [
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=npu:2(IDX:0-1)", "n1", "0,1"),
        ("     Nodes=n[1-2] CPU_IDs=0 Mem=0 GRES=npu:3(IDX:0-1,4)", "n2", "0,1,4"),
        (
            "     Nodes=n1 CPU_IDs=0 Mem=0 GRES=npu:1(IDX:0)\n     Nodes=n2 CPU_IDs=0-3 Mem=0 GRES=npu:1(IDX:7)",
            "n2",
            "7",
        ),
        ("     Nodes=n[1-2,40] CPU_IDs=0 Mem=0 GRES=npu:ascend910b:2(IDX:6-7)", "n40", "6,7"),
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:1(IDX:5),npu:2(IDX:2-3)", "n1", "2,3"),
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=xnpu:1(IDX:5),npu:2(IDX:0,2)", "n1", "0,2"),
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=npu:2(IDX:0-1)", "n2", None),
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=npu:2(IDX:0-1)", "n", None),
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=npu:2", "n1", None),
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)", "n1", None),
        ("     Nodes=n1 CPU_IDs=0 Mem=0 GRES=", "n1", None),
    ],
)
def test_the_devices_that_slurm_granted(lines: str, node: str, devices: str | None) -> None:
    function = (REPOSITORY / "launch" / "slurm" / "devices.sh").read_text()
    done = subprocess.run(
        ["bash", "-c", f'set -euo pipefail\n{SCONTROL}\n{function}\ngranted_devices "$1" npu', "-", node],
        input=DETAILS.format(lines=lines),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert (done.returncode, done.stdout.strip()) == ((1, "") if devices is None else (0, devices))
