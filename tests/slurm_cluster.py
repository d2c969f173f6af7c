"""A Slurm with two nodes, n1 and n2, on this machine: a munged, a slurmctld and two slurmd of its own.

Each node has two made-up NPUs. All files are in a temporary folder; nothing of the machine's own Slurm is touched.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from namespaces import needs_root_and

NODES = ("n1", "n2")
PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}

# The daemons log to standard error as well.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile=/dev/null
SlurmdLogFile=/dev/null
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=5
GresTypes=npu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000 Gres=npu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 Gres=npu:2
PartitionName=tests Nodes=n1,n2 Default=YES State=UP
"""


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster.

    Attributes:
        environment: variables for commands that talk to it.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *command: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command such as `sbatch`, with further environment variables."""
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def output(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints; it has to succeed."""
        done = self.run(*command, cwd=cwd, **variables)
        assert done.returncode == 0, f"{shlex.join(map(str, command))}: {done.stderr}{done.stdout}"
        return done.stdout

    def submit(self, *arguments: object, cwd: Path | None = None, **variables: str) -> str:
        """The number of the job that `sbatch` makes of its arguments."""
        return self.output("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def requeue(self, number: str) -> None:
        """Start a job that has ended anew."""
        self.output("scontrol", "requeue", number)
        self._start_soon(number)

    def lose(self, node: str, number: str) -> None:
        """Lose a node, which comes back; start the job that was on it as soon as Slurm has queued that anew."""
        self.output("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        _wait(self, lambda: self.job(number)["JobState"] == "PENDING", "the job is not queued anew")
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")  # refused where it is back already
        self._start_soon(number)

    def _start_soon(self, number: str) -> None:
        """Not after two minutes, as Slurm would; nor in the second of the job's end, when nodes refuse it."""
        self.output("scontrol", "update", f"JobId={number}", "StartTime=now+3")

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, ExitCode, NodeList, Restarts, ..."""
        fields = self.output("scontrol", "show", "job", "--oneliner", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def ended(self, number: str, seconds: float = 240.0) -> dict[str, str]:
        """The job, as soon as it has ended in one way or another."""
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < end, f"the job does not end: {job}\n{self.logs()}"
            time.sleep(0.2)
        return job

    def logs(self, lines: int = 15) -> str:
        """The last lines of what each daemon wrote."""
        tails = {path.name: path.read_text().splitlines()[-lines:] for path in sorted(self.folder.glob("*.log"))}
        return "\n".join("\n".join([f"{name}:", *tail]) for name, tail in tails.items())


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Started and idle. At the end its jobs are cancelled and its daemons are gone."""
    needs_root_and(PROGRAMS)
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as daemons:
        cluster = SlurmCluster(Path(name), _environment(Path(name)))
        _write_files(cluster.folder)
        munge = {
            option: cluster.folder / f"munge.{option}" for option in ("key-file", "socket", "pid-file", "seed-file")
        }
        options = [f"--{option}={path}" for option, path in munge.items()]
        daemons.enter_context(_daemon(cluster, "munged", "munged", "--foreground", "--force", *options))
        _wait(cluster, munge["socket"].exists, "munged does not start")
        daemons.enter_context(_daemon(cluster, "slurmctld", "slurmctld", "-D"))
        for node in NODES:
            daemons.enter_context(_daemon(cluster, node, "slurmd", "-D", "-N", node))
        _wait(cluster, lambda: _states(cluster) == ["idle", "idle"], "the nodes do not become idle")
        daemons.callback(_cancel_jobs, cluster)
        yield cluster


def _environment(folder: Path) -> dict[str, str]:
    """These tests may themselves run in a job of another Slurm."""
    own = ("SLURM", "SBATCH_", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return kept | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}


def _write_files(folder: Path) -> None:
    folder.chmod(0o755)  # munge wants its socket to be in reach of everyone
    (folder / "munge.key-file").write_bytes(os.urandom(128))
    (folder / "munge.key-file").chmod(0o600)
    (folder / "state").mkdir()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, host=host, ports=_free_ports(3)))
    for card in range(2):
        (folder / f"davinci{card}").touch()
    (folder / "gres.conf").write_text(f"Name=npu File={folder}/davinci[0-1]\n")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _daemon(cluster: SlurmCluster, name: str, *command: str) -> Iterator[None]:
    """Ends with the block, and with this process however that ends."""
    with (cluster.folder / f"{name}.log").open("w") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=cluster.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the tests, which then end it
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _states(cluster: SlurmCluster) -> list[str]:
    return cluster.run("sinfo", "--noheader", "--Node", "--format=%t").stdout.split()


def _cancel_jobs(cluster: SlurmCluster) -> None:
    cluster.run("scancel", "--user=root")
    _wait(cluster, lambda: not cluster.output("squeue", "--noheader"), "jobs do not end")


def _wait(cluster: SlurmCluster, done: Callable[[], bool], failure: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{failure} within {seconds:g} s\n{cluster.logs()}"
        time.sleep(0.1)
