"""Ranks find those of the same start, whatever earlier starts have left in the store."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from torch.distributed import HashStore, Store

from npu_rec.distributed.rendezvous import meet
from npu_rec.errors import DistributedError


def start(store: Store, ranks: Sequence[int], size: int, timeout: float = 20.0) -> dict[int, Store | DistributedError]:
    """What `meet` gives each of the ranks, which are threads here."""
    results: dict[int, Store | DistributedError] = {}

    def come(rank: int) -> None:
        try:
            results[rank] = meet(store, rank, size, timeout)
        except DistributedError as error:
            results[rank] = error

    threads = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    return results


def together(results: dict[int, Store | DistributedError]) -> Store:
    """All ranks see what any of them writes."""
    stores = []
    for rank, result in results.items():
        assert isinstance(result, Store), result
        result.set(f"from {rank}", "here")
        stores.append(result)
    for store in stores:
        assert store.check([f"from {rank}" for rank in results])
    return stores[0]


def test_a_restart_does_not_see_what_was_left() -> None:
    store = HashStore()
    first = together(start(store, [0, 1, 2], 3))
    first.set("address of rank 1", "a dead process")
    second = together(start(store, [2, 1, 0], 3))
    assert not second.check(["address of rank 1"])


def test_a_start_in_which_some_never_came() -> None:
    store = HashStore()
    for came in ([0, 2], [1, 2]):  # the others may be welcomed before the first rank gives up
        assert isinstance(start(store, came, 3, timeout=0.3)[came[0]], DistributedError)
    together(start(store, [0, 1, 2], 3))


def test_the_missing_are_named() -> None:
    (error,) = start(HashStore(), [0], 3, timeout=0.2).values()
    with pytest.raises(DistributedError, match=r"rank 0 of 3: 2 ranks have not come .* within 0.2 s \(1, 2\)"):
        raise error  # type: ignore[misc]
    (error,) = start(HashStore(), [1], 3, timeout=0.2).values()
    with pytest.raises(DistributedError, match=r"rank 1 of 3: rank 0 has not come"):
        raise error  # type: ignore[misc]
