"""How the ranks of one start find each other in a store that earlier starts of the same run have written to.

torchrun keeps one store over its restarts and hands it to every new set of processes as it is (PyTorch 2.13, issue
135712 there): a rank that comes early reads the address of a dead one, and fails to connect. Its count of restarts is
no way out, since each node counts its own. So the first rank of a start gives it a name, and makes sure that all
others have heard this name, not an earlier one.
"""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from npu_rec.errors import DistributedError

_POLL_SECONDS = 0.02
_SHOWN = 8


def meet(store: Store, rank: int, size: int, timeout: float) -> Store:
    """The part of the store that belongs to this start alone; all `size` ranks call it.

    The first rank returns when all have come; another when the first has, and may then wait for the rest elsewhere.

    Args:
        timeout: seconds that ranks wait for each other.

    Raises:
        DistributedError: some did not come; the first rank names them.
    """
    shared, own = PrefixStore("npu_rec/meet", store), uuid4().hex
    if rank == 0:
        _welcome(shared, own, size, timeout)
        return PrefixStore(f"npu_rec/{own}", store)
    shared.set(f"hello/{rank}", own)
    try:
        shared.wait([f"welcome/{own}"], timedelta(seconds=timeout))
    except dist.DistStoreError as error:
        raise DistributedError(
            f"rank {rank} of {size}: rank 0 has not come to the start within {timeout:g} s: see its log"
        ) from error
    name = shared.get(f"welcome/{own}").decode()
    shared.set(f"heard/{name}/{rank}", "")
    return PrefixStore(f"npu_rec/{name}", store)


def _welcome(shared: Store, own: str, size: int, timeout: float) -> None:
    """Answer the ranks that say hello until each has heard the answer: a hello may be that of a dead process."""
    waiting, deadline = list(range(1, size)), time.monotonic() + timeout
    while waiting:
        for rank in waiting:
            if shared.check([f"hello/{rank}"]):
                shared.set(f"welcome/{shared.get(f'hello/{rank}').decode()}", own)
        time.sleep(_POLL_SECONDS)
        waiting = [rank for rank in waiting if not shared.check([f"heard/{own}/{rank}"])]
        if waiting and time.monotonic() > deadline:
            shown = ", ".join(map(str, waiting[:_SHOWN])) + (", ..." if len(waiting) > _SHOWN else "")
            raise DistributedError(
                f"rank 0 of {size}: {len(waiting)} ranks have not come to the start within {timeout:g} s ({shown}): "
                "see their logs"
            )
