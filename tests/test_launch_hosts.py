"""`npu-rec launch --scheduler torchrun` on two hosts, network namespaces of this machine: they train as one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from launch_programs import FATAL
from namespaces import INTERFACE, Host, two_hosts
from train_ranks import Job, column, run_jobs, worst


class Ended(NamedTuple):
    """Exit code and standard error of a command."""

    code: int
    said: str


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


def launch(hosts: tuple[Host, Host], on: Sequence[Host], shop: Path, folder: Path, *options: str) -> list[Ended]:
    """Give the command for both hosts on those of `on`; how it ended on each."""
    addresses = ", ".join(host.address for host in hosts)
    command = [sys.executable, "-m", "npu_rec", "launch", shop, "--scheduler", "torchrun", "--run-dir", folder / "run"]
    for option in (f"cluster.hosts=[{addresses}]", "cluster.nodes=2", "cluster.cards_per_node=1", *options):
        command += ["--set", option]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    logs = [folder / f"host-{node}.log" for node in range(len(on))]
    running = []
    try:
        for node, host in enumerate(on):
            with logs[node].open("w") as log:
                running.append(
                    subprocess.Popen(
                        host.command(*command),
                        cwd=folder,
                        env=environment | {"OMP_NUM_THREADS": "1"},
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                    )
                )
        codes = [process.wait(240) for process in running]
    except subprocess.TimeoutExpired:
        pytest.fail("it takes too long:\n" + "\n".join(log.read_text() for log in logs))
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()  # torchrun, which ends its ranks
                process.wait(60)
    return [Ended(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def test_two_hosts_train_as_one_process_though_a_rank_dies(
    hosts: tuple[Host, Host], shop: Path, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "run"
    run_jobs([Job(str(shop), str(alone), ())])
    (tmp_path / "fatal.py").write_text(FATAL)
    task = ("imports=[fatal]", "task.name=fatal", "train.checkpoint_every=2")
    (first, first_log), (second, second_log) = launch(
        hosts, hosts, shop, tmp_path, f"cluster.interface={INTERFACE}", *task
    )
    assert (first, second) == (0, 0), first_log + second_log
    assert "8 steps on cpu, 2 processes" in first_log
    assert "failed (exitcode: -9) local_rank: 0" in second_log
    assert "resumed from step 4" in first_log
    assert worst(column(together, "loss"), column(alone, "loss")) < 1e-5


def test_an_interface_that_a_host_lacks_is_named(hosts: tuple[Host, Host], shop: Path, tmp_path: Path) -> None:
    """Before training starts, in one line, with those that the host has."""
    (ended,) = launch(hosts, hosts[:1], shop, tmp_path, "cluster.interface=eth9")
    assert ended.code == 2, ended.said
    assert re.fullmatch(rf"error: cluster\.interface: \S+ has no eth9, it has (.* )?{INTERFACE}( .*)?\n", ended.said)
    assert "lo" in ended.said.split()
