"""Rank tables: what is read, what is refused with file and reason, and how a pod finds its place in one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from npu_rec.config import load_config
from npu_rec.errors import ConfigError
from npu_rec.launching import render_launch
from npu_rec.launching.place import main as place
from npu_rec.launching.place import wait_for
from npu_rec.launching.rank_table import read_rank_table

Table = dict[str, Any]
CONFIG = REPOSITORY / "tests" / "golden" / "launch" / "ascend.config.yaml"


def version_1(servers: int = 2, cards: int = 2) -> Table:
    """A2: version 1.0."""
    return {
        "status": "completed",
        "version": "1.0",
        "server_count": str(servers),
        "server_list": [
            {
                "server_id": f"10.0.0.1{server + 1}",
                "container_ip": f"172.16.0.{server + 1}",
                "device": [
                    {
                        "device_id": str(card),
                        "device_ip": f"192.168.{server}.{card + 1}",
                        "rank_id": str(server * cards + card),
                    }
                    for card in range(cards)
                ],
            }
            for server in range(servers)
        ],
    }


def version_12(servers: int = 2, cards: int = 2) -> Table:
    """A3: super pods."""
    table = version_1(servers, cards) | {"version": "1.2"}
    number = 0
    for server in table["server_list"]:
        for device in server["device"]:
            device["super_device_id"] = str(number)
            number += 1
    table["super_pod_list"] = [
        {"super_pod_id": "0", "server_list": [{"server_id": server["server_id"]} for server in table["server_list"]]}
    ]
    return table


def version_2(ranks: int = 4) -> Table:
    """950: no servers."""
    address = {"addr_type": "EID", "addr": "000000000000002000100000df001001", "ports": ["0/0"], "plane_id": "0"}
    level = {"net_instance_id": "a", "net_type": "TOPO_FILE_DESC", "net_attr": "", "rank_addr_list": [address]}
    return {
        "version": "2.0",
        "rank_count": ranks,
        "rank_list": [
            {"rank_id": rank, "local_id": rank % 2, "device_id": rank % 2, "level_list": [{"net_layer": 0, **level}]}
            for rank in range(ranks)
        ],
    }


def written(folder: Path, table: Table) -> Path:
    path = folder / "hccl.json"
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize("table", [version_1(), version_12(), version_2()], ids=["1.0", "1.2", "2.0"])
def test_each_version_is_read(table: Table, tmp_path: Path) -> None:
    read = read_rank_table(written(tmp_path, table))
    assert read.version == table["version"]
    assert [(entry.rank, entry.device) for entry in read.entries] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    read.check_nodes(2, 2)
    servers = table.get("server_list", [])
    assert [server[0] for server in read.servers] == [server["server_id"] for server in servers]


def change(*path: str | int, to: Any) -> Callable[[Table], None]:
    def apply(table: Any) -> None:
        for part in path[:-1]:
            table = table[part]
        table[path[-1]] = to

    return apply


def drop(*path: str | int) -> Callable[[Table], None]:
    def apply(table: Any) -> None:
        for part in path[:-1]:
            table = table[part]
        del table[path[-1]]

    return apply


DEVICE = ("server_list", 1, "device", 0)


@pytest.mark.parametrize(
    ("table", "wrong", "reason"),
    [
        (version_1(), change("version", to="1.1"), "version '1.1' is none of 1.0, 1.2, 2.0"),
        (version_1(), change("version", to=1.0), "the file: version must be a string, not 1.0"),
        (version_1(), drop("status"), "the file has no status"),
        (
            version_1(),
            change("status", to="initializing"),
            "status is 'initializing', not 'completed': whoever makes the table is not done",
        ),
        (
            version_1(),
            change("server_count", to=2),
            'the file: server_count must be a number in quotes, such as "0", not 2',
        ),
        (version_1(), change("server_count", to="3"), "server_count is 3, but server_list has 2 servers"),
        (version_1(), change("server_list", to=[]), "the file: server_list must be a list with entries"),
        (version_1(), change("server_list", 0, to=7), "server_list[0] is not an object"),
        (version_1(), change("server_list", 1, "server_id", to="10.0.0.11"), "server_id 10.0.0.11 is there twice"),
        (
            version_1(),
            change(*DEVICE, "rank_id", to=2),
            'server_list[1].device[0]: rank_id must be a number in quotes, such as "0", not 2',
        ),
        (version_1(), change(*DEVICE, "rank_id", to="1"), "rank_id 1 is there twice"),
        (
            version_1(),
            change(*DEVICE, "rank_id", to="9"),
            "rank_id 2 is missing: 4 ranks count from 0 without a gap",
        ),
        (version_1(), change(*DEVICE, "device_id", to="1"), "device_id of server 10.0.0.12 1 is there twice"),
        (version_1(), change(*DEVICE, "device_ip", to="192.168.0.1"), "device_ip 192.168.0.1 is there twice"),
        (version_1(), change(*DEVICE, "device_ip", to="x"), "server_list[1].device[0]: device_ip 'x' is no IP address"),
        (version_1(), drop(*DEVICE, "device_ip"), "server_list[1].device[0] has no device_ip"),
        (version_12(), drop(*DEVICE, "super_device_id"), "server_list[1].device[0] has no super_device_id"),
        (version_12(), drop("super_pod_list"), "the file has no super_pod_list"),
        (
            version_12(),
            drop("super_pod_list", 0, "server_list", 1),
            "server 10.0.0.12 is not in super_pod_list",
        ),
        (
            version_12(),
            change("super_pod_list", 0, "server_list", 1, "server_id", to="10.0.0.13"),
            "server 10.0.0.12 is not in super_pod_list",
        ),
        (version_2(), change("rank_count", to="4"), 'the file: rank_count must be a whole number, not "4"'),
        (version_2(), change("rank_count", to=5), "rank_count is 5, but rank_list has 4 ranks"),
        (version_2(), change("rank_list", 1, "rank_id", to=0), "rank_id 0 is there twice"),
        (version_2(), drop("rank_list", 1, "local_id"), "rank_list[1] has no local_id"),
        (
            version_2(),
            change("rank_list", 1, "level_list", 0, "rank_addr_list", to=[]),
            "rank_list[1].level_list[0]: rank_addr_list must be a list with entries",
        ),
    ],
)
def test_what_is_refused(table: Table, wrong: Callable[[Table], None], reason: str, tmp_path: Path) -> None:
    table = copy.deepcopy(table)
    wrong(table)
    path = written(tmp_path, table)
    with pytest.raises(ConfigError) as raised:
        read_rank_table(path)
    assert str(raised.value) == f"{path}: {reason}"


def test_a_link_and_other_files_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, version_1())
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(
        ConfigError, match=f"{link}: is a symbolic link, which HCCL refuses; give the file itself, {path}"
    ):
        read_rank_table(link)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_rank_table(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="the file is not an object"):
        read_rank_table(path)
    with pytest.raises(ConfigError, match="the rank table cannot be read"):
        read_rank_table(tmp_path / "nowhere.json")


def launched(path: Path, scheduler: str, *overrides: str) -> str:
    overrides = ("cluster.cards_per_node=2", f"cluster.rank_table={path}", *overrides)
    return render_launch(load_config(CONFIG, list(overrides)), CONFIG, scheduler=scheduler, overrides=overrides).shown()


def refused(path: Path, scheduler: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        launched(path, scheduler, *overrides)
    return str(raised.value)


def test_a_table_must_have_the_ranks_of_the_job(tmp_path: Path) -> None:
    hosts = "cluster.hosts=[127.0.0.1, 10.0.0.12]"
    path = written(tmp_path, version_1(2, 4))
    assert refused(path, "torchrun", hosts) == (
        f"--set: cluster.rank_table: {path} has 8 ranks, but 2 nodes x 2 cards are 4"
    )
    path = written(tmp_path, version_1(1, 4))
    assert refused(path, "torchrun", hosts) == f"{path}: server_list has 1 servers, but cluster.nodes is 2"
    table = version_1()
    table["server_list"][0]["device"][1]["rank_id"], table["server_list"][1]["device"][0]["rank_id"] = "2", "1"
    path = written(tmp_path, table)
    assert refused(path, "torchrun", hosts) == (
        f"{path}: ranks 0 to 1 must be the cards of one server in their order, as torchrun numbers them"
    )


def test_torchrun_and_slurm_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, version_1())
    assert f"export RANK_TABLE_FILE={path}\n" in launched(path, "torchrun", "cluster.hosts=[127.0.0.1, 10.0.0.12]")
    assert refused(path, "torchrun", "cluster.hosts=[127.0.0.1, 10.0.0.11]") == (
        f"--set: cluster.hosts: 10.0.0.11 is node 1 here, but node 0 in {path}"
    )
    assert "names servers: add --nodelist=" in refused(path, "slurm")
    assert f"export RANK_TABLE_FILE={path}\n" in launched(path, "slurm", 'cluster.slurm.directives=["--nodelist=a,b"]')


def test_volcano_takes_it_along(tmp_path: Path) -> None:
    path = written(tmp_path, version_1())
    assert "set cluster.kubernetes.host_network to true" in refused(path, "volcano")
    shown = launched(path, "volcano", "cluster.kubernetes.host_network=true")
    (rings,) = [d for d in yaml.safe_load_all(shown) if d["metadata"]["name"] == "rings-config-shop-ascend"]
    assert json.loads(rings["data"]["hccl.json"]) == version_1()
    written(tmp_path, version_2())
    assert "version 2.0 names no servers" in refused(path, "volcano", "cluster.kubernetes.host_network=true")


def test_ascendjob_and_modelarts_refuse_one(tmp_path: Path) -> None:
    path = written(tmp_path, version_1())
    assert "the Ascend Operator numbers the ranks of an AscendJob itself" in refused(path, "ascendjob")


def test_the_place_of_a_pod(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, copied = written(tmp_path, version_1()), tmp_path / "copy.json"
    link = tmp_path / "mounted.json"
    link.symlink_to(path)  # as Kubernetes mounts a ConfigMap
    place(str(link), str(copied), "10.0.0.12", "172.16.0.2")
    assert capsys.readouterr().out == "MASTER_ADDR=172.16.0.1 NODE_RANK=1\n"
    assert read_rank_table(copied).ranks == 4
    place(str(link), str(copied), "10.9.9.9", "172.16.0.1")
    assert capsys.readouterr().out == "MASTER_ADDR=172.16.0.1 NODE_RANK=0\n"
    with pytest.raises(ConfigError, match=r"no server has the address 10\.9\.9\.9 of this pod"):
        place(str(link), str(copied), "10.9.9.9")


def test_a_table_that_nobody_fills_in(tmp_path: Path) -> None:
    path = tmp_path / "hccl.json"
    path.write_text('{"status": "initializing"}')
    with pytest.raises(ConfigError, match="no controller of MindCluster fills in the ConfigMap"):
        wait_for(path, 0.0)
