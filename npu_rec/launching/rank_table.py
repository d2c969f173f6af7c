"""HCCL's rank table (hccl.json): which card of which server is which rank. Versions 1.0 (A2), 1.2 (A3), 2.0 (950)."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_rec.errors import ConfigError

VERSIONS = ("1.0", "1.2", "2.0")


@dataclass(frozen=True)
class Entry:
    """One rank.

    Attributes:
        device: number of the card in its server.
        server: index in `RankTable.servers`; in version 2.0, which names none, None.
    """

    rank: int
    device: int
    server: int | None


@dataclass(frozen=True)
class RankTable:
    """A table that has been checked.

    Attributes:
        path: the file, for messages.
        servers: the addresses of each server, `server_id` first.
        entries: by rank, from 0 without a gap.
        text: the file's content.
    """

    path: str
    version: str
    servers: tuple[tuple[str, ...], ...]
    entries: tuple[Entry, ...]
    text: str

    @property
    def ranks(self) -> int:
        """How many."""
        return len(self.entries)

    def check_nodes(self, nodes: int, cards: int) -> None:
        """Rank `cards * n + i` is the i-th card of the n-th server, as torchrun numbers its processes.

        Raises:
            ConfigError: it is not.
        """
        if self.version != "2.0" and len(self.servers) != nodes:
            raise ConfigError(f"{self.path}: server_list has {len(self.servers)} servers, but cluster.nodes is {nodes}")
        for first in range(0, self.ranks, cards):
            block = self.entries[first : first + cards]
            devices = [entry.device for entry in block]
            if len({entry.server for entry in block}) > 1 or devices != sorted(devices):
                raise ConfigError(
                    f"{self.path}: ranks {first} to {first + cards - 1} must be the cards of one server in their "
                    "order, as torchrun numbers them"
                )

    def place_of(self, addresses: Iterable[str]) -> int | None:
        """Which node the machine with one of these addresses is; None when it is in no server of the table."""
        order = list(dict.fromkeys(entry.server for entry in self.entries))
        for address in addresses:
            for server, known in enumerate(self.servers):
                if address in known:
                    return order.index(server)
        return None

    def addresses_of(self, node: int) -> tuple[str, ...]:
        """Addresses of a node's server."""
        server = list(dict.fromkeys(entry.server for entry in self.entries))[node]
        return self.servers[server] if server is not None else ()


def read_rank_table(path: Path) -> RankTable:
    """Read and check a rank table.

    Raises:
        ConfigError: with file, entry and reason.
    """
    if path.is_symlink():
        raise ConfigError(f"{path}: is a symbolic link, which HCCL refuses; give the file itself, {path.resolve()}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the rank table cannot be read: {error}") from None
    return parse_rank_table(text, str(path))


def parse_rank_table(text: str, path: str) -> RankTable:
    """Check the text of a rank table; `path` is for messages."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    table = _Node(raw, path, "the file")
    version = table.text("version")
    if version not in VERSIONS:
        raise ConfigError(f"{path}: version {version!r} is none of {', '.join(VERSIONS)}")
    if version == "2.0":
        servers: list[tuple[str, ...]] = []
        entries = _entries_of_version_2(table)
    else:
        servers, entries = _servers_and_entries(table, super_pods=version == "1.2")
    _check_ranks(entries, path)
    return RankTable(path, version, tuple(servers), tuple(sorted(entries, key=lambda e: e.rank)), text)


@dataclass(frozen=True)
class _Node:
    """A JSON object with a name for messages."""

    raw: Any
    path: str
    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.raw, dict):
            raise ConfigError(f"{self.path}: {self.name} is not an object")

    def get(self, key: str) -> Any:
        if key not in self.raw:
            raise ConfigError(f"{self.path}: {self.name} has no {key}")
        return self.raw[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self.path}: {self.name}: {key} must be a string, not {json.dumps(value)}")
        return value

    def digits(self, key: str) -> int:
        """A number, which versions 1.x write as a string."""
        value = self.get(key)
        if not isinstance(value, str) or not (value.isascii() and value.isdigit()):
            raise ConfigError(
                f'{self.path}: {self.name}: {key} must be a number in quotes, such as "0", not {json.dumps(value)}'
            )
        return int(value)

    def number(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self.path}: {self.name}: {key} must be a whole number, not {json.dumps(value)}")
        return value

    def address(self, key: str) -> str:
        value = self.text(key)
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise ConfigError(f"{self.path}: {self.name}: {key} {value!r} is no IP address") from None
        return value

    def nodes(self, key: str) -> list[_Node]:
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{self.path}: {self.name}: {key} must be a list with entries")
        return [
            _Node(inner, self.path, f"{key}[{i}]" if self.name == "the file" else f"{self.name}.{key}[{i}]")
            for i, inner in enumerate(value)
        ]


def _servers_and_entries(table: _Node, *, super_pods: bool) -> tuple[list[tuple[str, ...]], list[Entry]]:
    """Versions 1.0 and 1.2."""
    status = table.text("status")
    if status != "completed":
        raise ConfigError(f"{table.path}: status is {status!r}, not 'completed': whoever makes the table is not done")
    nodes = table.nodes("server_list")
    if table.digits("server_count") != len(nodes):
        raise ConfigError(
            f"{table.path}: server_count is {table.digits('server_count')}, but server_list has {len(nodes)} servers"
        )
    servers, entries = [], []
    for index, server in enumerate(nodes):
        optional = [server.address(key) for key in ("container_ip", "host_ip") if key in server.raw]
        servers.append((server.text("server_id"), *optional))
        for device in server.nodes("device"):
            device.address("device_ip")
            if super_pods:
                device.digits("super_device_id")
            entries.append(Entry(device.digits("rank_id"), device.digits("device_id"), index))
    path = table.path
    _check_distinct([server[0] for server in servers], path, "server_id")
    _check_distinct([(servers[entry.server or 0][0], entry.device) for entry in entries], path, "device_id of server")
    _check_distinct([d.text("device_ip") for s in nodes for d in s.nodes("device")], path, "device_ip")
    if super_pods:
        _check_super_pods(table, [server[0] for server in servers])
    return servers, entries


def _check_super_pods(table: _Node, servers: Sequence[str]) -> None:
    pods = table.nodes("super_pod_list")
    _check_distinct([pod.text("super_pod_id") for pod in pods], table.path, "super_pod_id")
    listed = [server.text("server_id") for pod in pods for server in pod.nodes("server_list")]
    _check_distinct(listed, table.path, "server_id of super_pod_list")
    for name in sorted(set(servers) ^ set(listed)):
        missing = "super_pod_list" if name in servers else "server_list"
        raise ConfigError(f"{table.path}: server {name} is not in {missing}")


def _entries_of_version_2(table: _Node) -> list[Entry]:
    nodes = table.nodes("rank_list")
    if table.number("rank_count") != len(nodes):
        raise ConfigError(
            f"{table.path}: rank_count is {table.number('rank_count')}, but rank_list has {len(nodes)} ranks"
        )
    for node in nodes:
        node.number("local_id")
        levels = node.nodes("level_list")
        _check_distinct([level.number("net_layer") for level in levels], table.path, f"net_layer of {node.name}")
        for level in levels:
            for address in level.nodes("rank_addr_list"):
                address.text("addr_type")
                address.text("addr")
    return [Entry(node.number("rank_id"), node.number("device_id"), None) for node in nodes]


def _check_ranks(entries: Sequence[Entry], path: str) -> None:
    ranks = [entry.rank for entry in entries]
    _check_distinct(ranks, path, "rank_id")
    missing = sorted(set(range(len(ranks))) - set(ranks))
    if missing:
        raise ConfigError(f"{path}: rank_id {missing[0]} is missing: {len(ranks)} ranks count from 0 without a gap")


def _check_distinct(values: Sequence[Any], path: str, what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(f"{path}: {what} {shown} is there twice")
        seen.add(value)
