"""Where everything goes on a cluster, what moves, and whether it fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from npu_rec.config import Config, parse_bytes
from npu_rec.distributed.balance import imbalance
from npu_rec.distributed.mirror import Message
from npu_rec.errors import ConfigError, TrainingError
from npu_rec.planning.changes import Change
from npu_rec.planning.simulate import Memory, Rank, simulate
from npu_rec.planning.size import Load, facts_of, load_of
from npu_rec.tasks import DataFacts

MOST_CARDS = 4096  # one rank of so many takes some gigabytes to build
HCCL_BUFFERS = 2 * 200 * 2**20  # bytes of a communicator, unless HCCL_BUFFSIZE (MiB of one buffer) says otherwise


@dataclass(frozen=True)
class Machines:
    """What a plan is for: `nodes` of `cards_per_node` cards with `memory` bytes, in hosts of `host_memory` bytes."""

    nodes: int
    cards_per_node: int
    memory: int
    host_memory: int

    @property
    def cards(self) -> int:
        """All of them."""
        return self.nodes * self.cards_per_node


@dataclass(frozen=True)
class Movement:
    """Collectives of one name in a step.

    Attributes:
        bytes_within_node, bytes_between_nodes: sent by a card (by its process, for those of the host).
        seconds: at the speeds of `cluster.links`, nothing else going on.
    """

    what: str
    op: str
    ranks: int
    count: int
    on_host: bool
    bytes_within_node: float
    bytes_between_nodes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The answer of `npu-rec plan`; bytes.

    Attributes:
        memory: of the fullest card, by what it is for.
        communicators: buffers that HCCL takes besides.
        bytes_per_card_max: at the fullest moment of a step, communicators included.
        host_bytes_per_node: of rows in host memory and of what each process must know of the data set.
        disk_bytes_per_node: of rows on disk.
        imbalance: largest over mean of the cards, of the bytes of the tables and of the tokens of a step.
        problems: why it does not fit; empty where it does. notes: what else one should know.
        changes: what was tried then, one at a time and then together.
    """

    name: str
    parameters: int
    table_parameters: int
    cards: int
    nodes: int
    bytes_per_card_max: int
    memory_limit: int
    fits: bool
    problems: list[str]
    notes: list[str]
    memory: Memory
    communicators: int
    host_bytes_per_node: int
    host_memory_limit: int
    disk_bytes_per_node: int
    load: Load
    tokens_per_card: int
    flops_per_card: float
    imbalance: dict[str, float]
    tables: list[dict[str, Any]]
    movements: list[Movement]
    seconds_moving: float
    changes: list[Change]


def machines_of(config: Config, cards: int | None, nodes: int | None, memory: str | None) -> Machines:
    """Those of `cluster:`, or of what is given instead.

    Raises:
        ConfigError: the cards cannot be divided over the nodes, or the memory is no size.
    """
    cluster = config.cluster
    each = cluster.cards_per_node
    if cards is None:
        cards = (nodes or cluster.nodes) * each
    if nodes is None:
        nodes = max(1, cards // each) if cards % each == 0 or cards < each else 0
    if nodes == 0:
        raise ConfigError(f"{cards} cards cannot be divided over nodes of {each}; give --nodes")
    if cards % nodes:
        raise ConfigError(f"{cards} cards cannot be divided over {nodes} nodes")
    if cards > MOST_CARDS:
        raise ConfigError(f"{cards:,} cards: plans are made for up to {MOST_CARDS:,}")
    try:
        limit = parse_bytes(memory or cluster.memory)
    except ValueError as error:
        raise ConfigError(f"--memory: {error}") from None
    return Machines(nodes, cards // nodes, limit, parse_bytes(cluster.host_memory))


def simulate_rank(config: Config, rank: int, ranks: int) -> tuple[Rank, list[Movement], int]:
    """One rank of many with full sequences, what it sends, bytes of HCCL; `npu-rec train --simulate-ranks`.

    Raises:
        ConfigError: there is no such rank, or it cannot be built.
    """
    if rank >= ranks:
        raise ConfigError(f"--rank {rank}: the {ranks} ranks are 0 to {ranks - 1}")
    if ranks > MOST_CARDS:
        raise ConfigError(f"--simulate-ranks {ranks:,}: at most {MOST_CARDS:,}")
    load = load_of(config, ranks, None)
    each = min(ranks, config.cluster.cards_per_node)
    try:
        simulated = simulate(config, facts_of(config), load, rank=rank, ranks=ranks, ranks_per_node=each)
    except TrainingError as error:
        raise ConfigError(str(error)) from None
    return simulated, _movements(config, simulated.messages), _communicators(config, simulated.messages)


def plan_step(config: Config, facts: DataFacts, machines: Machines, length: int | None = None) -> Plan:
    """Plan a training step in which every sequence has `length` events (None: as many as the model sees).

    Raises:
        ConfigError: the configuration cannot be built on so many cards.
    """
    cards = machines.cards
    load = load_of(config, cards, length)
    try:
        rank = simulate(config, facts, load, rank=0, ranks=cards, ranks_per_node=machines.cards_per_node)
    except TrainingError as error:
        raise ConfigError(str(error)) from None
    by_card = [sum(table.bytes_of(card) for table in rank.tables) for card in range(cards)]
    communicators = _communicators(config, rank.messages)
    peak = rank.memory.peak + max(by_card) - by_card[rank.rank] + communicators
    host, disk = _below(rank, facts, machines)
    problems = []
    if peak > machines.memory:
        problems.append(f"a card needs {size(peak)} of {size(machines.memory)}")
    if host > machines.host_memory:
        problems.append(f"a node's host needs {size(host)} of {size(machines.host_memory)}")
    movements = _movements(config, rank.messages)
    tables = [_table(table, cards) for table in rank.tables]
    table_parameters = sum(table["parameters"] for table in tables)
    return Plan(
        name=config.name,
        parameters=table_parameters + rank.parameters,
        table_parameters=table_parameters,
        cards=cards,
        nodes=machines.nodes,
        bytes_per_card_max=peak,
        memory_limit=machines.memory,
        fits=not problems,
        problems=problems,
        notes=_notes(load, cards, config),
        memory=rank.memory,
        communicators=communicators,
        host_bytes_per_node=host,
        host_memory_limit=machines.host_memory,
        disk_bytes_per_node=disk,
        load=load,
        tokens_per_card=rank.tokens,
        flops_per_card=rank.flops,
        imbalance={"tables": imbalance(by_card), "tokens": load.imbalance},
        tables=tables,
        movements=movements,
        seconds_moving=sum(movement.seconds for movement in movements),
        changes=[],
    )


def size(count: float) -> str:
    """`17.20 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:,.2f} {unit}"


def _notes(load: Load, cards: int, config: Config) -> list[str]:
    groups = cards // config.parallel.context if cards > 1 else 1
    idle = groups - round(load.mean_sequences * groups)
    return [f"{idle} of {groups} cards have no sequence: a batch is smaller"] if idle > 0 else []


def _communicators(config: Config, messages: Sequence[Message]) -> int:
    """HCCL's buffers, one pair for every group of ranks that moves tensors of the device."""
    if config.device.backend not in ("auto", "ascend"):
        return 0
    size = config.cluster.env.get("HCCL_BUFFSIZE")
    each = HCCL_BUFFERS if size is None else 2 * int(size) * 2**20
    return each * len({(m.ranks, m.group) for m in messages if not m.on_host})


def _below(rank: Rank, facts: DataFacts, machines: Machines) -> tuple[int, int]:
    """Bytes in the host memory and on the disk of a node."""
    known = [x for x in (facts.catalogue, facts.item_counts) if isinstance(x, Tensor)]
    sums = {"host": sum(x.nbytes for x in known) * machines.cards_per_node, "disk": 0, "device": 0}
    for table in rank.tables:
        sums[table.tier] += max(table.bytes_below(card) for card in range(rank.ranks)) * machines.cards_per_node
    return sums["host"], sums["disk"]


def _table(table: Any, cards: int) -> dict[str, Any]:
    sizes = [table.bytes_of(card) for card in range(cards)]
    return {
        "name": table.name,
        "rows": table.rows,
        "dim": table.dim,
        "placement": table.placement,
        "parameters": table.parameters,
        "state": table.state,
        "bytes": 4 * table.parameters,
        "bytes_per_card_max": max(sizes),
        "bytes_per_card_mean": sum(sizes) / cards,
        "imbalance": imbalance(sizes),
        "tier": table.tier,
        "tier_bytes_per_card": max(table.bytes_below(card) for card in range(cards)),
    }


def _movements(config: Config, messages: Sequence[Message]) -> list[Movement]:
    links = config.cluster.links
    together: dict[tuple[str, str, int, bool], list[Message]] = defaultdict(list)
    for message in messages:
        together[message.what, message.op, message.ranks, message.on_host].append(message)
    movements = []
    for (what, op, ranks, on_host), same in together.items():
        within, between = sum(m.within_node for m in same), sum(m.between_nodes for m in same)
        if on_host:
            seconds = (within + between) / (links.host * 1e9)
        else:
            seconds = within / (links.within_node * 1e9) + between / (links.between_nodes * 1e9)
        movements.append(Movement(what, op, ranks, len(same), on_host, within, between, seconds))
    return movements


def as_document(plan: Plan) -> dict[str, Any]:
    """As JSON."""
    return asdict(plan)
