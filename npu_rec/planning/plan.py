"""Where everything goes on a cluster, what moves, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from npu_rec.config import Config, parse_bytes
from npu_rec.distributed.balance import imbalance
from npu_rec.distributed.mirror import Message
from npu_rec.errors import ConfigError, TrainingError
from npu_rec.planning.changes import Shortage, changed, changes_for
from npu_rec.planning.simulate import Memory, Rank, simulate
from npu_rec.planning.size import Load, facts_of, load_of
from npu_rec.tasks import DataFacts

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
class Change:
    """A change of the configuration, and the bytes of the fullest card with it; None: it cannot run so."""

    settings: dict[str, Any]
    cards: int
    bytes_per_card_max: int | None
    fits: bool
    reason: str = ""


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
        problems: why it does not fit; empty where it does.
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
    if nodes == 0 or cards % nodes:
        raise ConfigError(
            f"{cards} cards cannot be divided over {nodes or f'nodes of {each}'}; give --cards and --nodes"
        )
    try:
        limit = parse_bytes(memory or cluster.memory)
    except ValueError as error:
        raise ConfigError(f"--memory: {error}") from None
    return Machines(nodes, cards // nodes, limit, parse_bytes(cluster.host_memory))


def simulate_rank(config: Config, rank: int, ranks: int) -> tuple[Rank, list[Movement]]:
    """One rank of many with full sequences, and what it sends; `npu-rec train --simulate-ranks`.

    Raises:
        ConfigError: there is no such rank, or it cannot be built.
    """
    if rank >= ranks:
        raise ConfigError(f"--rank {rank}: the {ranks} ranks are 0 to {ranks - 1}")
    load = load_of(config, ranks, None)
    each = min(ranks, config.cluster.cards_per_node)
    try:
        simulated = simulate(config, facts_of(config), load, rank=rank, ranks=ranks, ranks_per_node=each)
    except TrainingError as error:
        raise ConfigError(str(error)) from None
    return simulated, _movements(config, simulated.messages)


def make_plan(
    config: Config,
    facts: DataFacts,
    machines: Machines,
    length: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plan a training step in which every sequence has `length` events (None: as many as the model sees).

    Args:
        tell: hears what is being tried where it does not fit.

    Raises:
        ConfigError: the configuration cannot be built on so many cards.
    """
    plan = _plan(config, facts, machines, length)
    if plan.fits:
        return plan
    tried: list[Change] = []
    for settings, cards in changes_for(config, _shortage(plan, machines)):
        if cards > machines.cards and any(change.fits for change in tried):
            break  # more cards are the last thing to try
        tell(f"does not fit; trying {described(settings, cards)}")
        more = machines if cards == machines.cards else _with_cards(machines, cards)
        tried.append(_try(config, facts, more, length, settings))
    return replace(plan, changes=tried)


def _shortage(plan: Plan, machines: Machines) -> Shortage:
    memory, tables = plan.memory, plan.tables
    held = sum(table["bytes_per_card_max"] for table in tables)
    return Shortage(
        cards=machines.cards,
        cards_per_node=machines.cards_per_node,
        memory=machines.memory,
        host_memory=machines.host_memory,
        needed=plan.bytes_per_card_max,
        lasting=held + memory.parameters + memory.optimizer_states + memory.gradients + plan.communicators,
        table_bytes=held * machines.cards,
        row_bytes=sum(4 * table["dim"] * (1 + table["state"]) for table in tables),
        sequences=plan.load.sequences,
    )


def described(settings: dict[str, Any], cards: int) -> str:
    """A change in words: its settings, or more cards."""
    return ", ".join(f"{name}={str(value).lower()}" for name, value in settings.items()) or f"{cards:,} cards"


def _with_cards(machines: Machines, cards: int) -> Machines:
    nodes = -(-cards // machines.cards_per_node)
    return Machines(nodes, cards // nodes, machines.memory, machines.host_memory)


def _try(config: Config, facts: DataFacts, machines: Machines, length: int | None, settings: dict[str, Any]) -> Change:
    try:
        plan = _plan(changed(config, settings), facts, machines, length)
    except ConfigError as error:
        return Change(settings, machines.cards, None, False, str(error))
    return Change(settings, machines.cards, plan.bytes_per_card_max, plan.fits, "; ".join(plan.problems))


def _plan(config: Config, facts: DataFacts, machines: Machines, length: int | None) -> Plan:
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
        problems.append(f"a card needs {peak / 2**30:.2f} GiB of {machines.memory / 2**30:.2f}")
    if host > machines.host_memory:
        problems.append(f"a node's host needs {host / 2**30:.1f} GiB of {machines.host_memory / 2**30:.1f}")
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
