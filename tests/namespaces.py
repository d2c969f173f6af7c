"""Two hosts on this machine: network namespaces with a cable between them. And what tests that need root ask first."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

INTERFACE = "veth0"


@dataclass(frozen=True)
class Host:
    """A network namespace; the interface to the other one is INTERFACE."""

    name: str
    address: str

    def command(self, *arguments: object) -> list[str]:
        """`arguments`, to be run on this host."""
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]


def needs_root_and(programs: Mapping[str, str]) -> None:
    """Skip the test where root or a program is missing. Where .ci/run has installed them, a missing program fails.

    Args:
        programs: what has to be there -> the Debian package it comes from.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = dict.fromkeys(programs[program] for program in missing)
        reason = f"needs {', '.join(missing)} (apt-get install {' '.join(packages)})"
        if os.environ.get("NPU_REC_REQUIRE_LAUNCH_TESTS"):
            pytest.fail(reason)
        pytest.skip(reason)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, and nothing else; each has its own loopback.

    The test is skipped where root is not allowed to make them, as in a container without privileges.
    """
    needs_root_and({"ip": "iproute2"})
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"needs a root that may make namespaces (CAP_SYS_ADMIN): {tried.stderr.strip()}")
    hosts = tuple(Host(f"npu-rec-{os.getpid()}-{i}", f"10.213.76.{i + 1}") for i in range(2))
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "delete", host.name)  # the cable goes with it
        ends = [("netns", host.name, "type", "veth") for host in hosts]
        _ip("link", "add", INTERFACE, *ends[0], "peer", "name", INTERFACE, *ends[1][:2])
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/30", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield hosts[0], hosts[1]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
