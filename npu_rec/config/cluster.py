"""`cluster:`, the machines that a run is planned for and launched on."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from npu_rec.config.section import Positive, Section

_UNITS = {unit: 1024**power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))}


def parse_bytes(text: str) -> int:
    """Bytes of `64GiB`, `512 MiB`, `1.5TB` (a B that is not iB counts in thousands) or a plain number.

    Raises:
        ValueError: it is none of these, or nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTP]?)(i?)B?)?\s*", text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is no size; write it as 64GiB")
    unit = _UNITS[match[2]] if match[3] or not match[2] else 1000 ** list(_UNITS).index(match[2])
    size = int(float(match[1]) * unit)
    if size < 1:
        raise ValueError(f"{text!r} is no size; write it as 64GiB")
    return size


def _is_size(text: str) -> str:
    parse_bytes(text)
    return text


Size = Annotated[str, AfterValidator(_is_size)]


class LinkConfig(Section):
    """What a card can send, for the times that `plan` estimates."""

    within_node: float = Field(
        196.0, gt=0, description="GB/s (10^9 bytes) that a card sends to the other cards of its node."
    )
    between_nodes: float = Field(25.0, gt=0, description="GB/s that a card sends to cards of other nodes.")
    host: float = Field(12.0, gt=0, description="GB/s between the hosts of two processes, for ids (gloo).")


class ClusterConfig(Section):
    """The machines a run is planned for and launched on; training itself reads nothing of it."""

    nodes: Positive = Field(1, description="Machines.")
    cards_per_node: Positive = Field(8, description="Cards of each, with a process each.")
    memory: Size = Field("64GiB", description="Device memory of a card, for `plan`.")
    host_memory: Size = Field("1536GiB", description="Memory of a machine, for `plan`.")
    links: LinkConfig = Field(default_factory=LinkConfig, description="Speeds, for `plan`.")
