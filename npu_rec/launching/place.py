"""`python -m npu_rec.launching.place TABLE COPY ADDRESS... `: where in a rank table this pod is, as shell variables.

TABLE is the mounted ConfigMap, which MindCluster's controller may still have to fill in, and which is a symbolic link;
HCCL wants a file of its own, COPY.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

from npu_rec.errors import ConfigError
from npu_rec.launching.rank_table import parse_rank_table

_POLL_SECONDS = 1.0


def main(table: str, copy: str, *addresses: str) -> None:
    """Wait for the table as long as HCCL_CONNECT_TIMEOUT says, copy it and print MASTER_ADDR and NODE_RANK."""
    limit = float(os.environ.get("HCCL_CONNECT_TIMEOUT", "120"))
    text = wait_for(Path(table), limit)
    parsed = parse_rank_table(text, table)
    place = parsed.place_of(addresses)
    if place is None:
        raise ConfigError(f"{table}: no server has the address {' or '.join(addresses)} of this pod")
    Path(copy).write_text(text, encoding="utf-8")
    first = parsed.addresses_of(0)
    print(f"MASTER_ADDR={shlex.quote(first[1] if len(first) > 1 else first[0])} NODE_RANK={place}")


def wait_for(table: Path, seconds: float) -> str:
    """The text of the table, once it no longer says that it is being made.

    Raises:
        ConfigError: it still does after `seconds`.
    """
    end = time.monotonic() + seconds
    while '"initializing"' in (text := table.read_text(encoding="utf-8")):
        if time.monotonic() > end:
            raise ConfigError(
                f"{table}: status is still 'initializing' after {seconds:g} s: no controller of MindCluster fills in "
                "the ConfigMap; see its log, or set cluster.kubernetes.rank_table to none"
            )
        time.sleep(_POLL_SECONDS)
    return text


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
