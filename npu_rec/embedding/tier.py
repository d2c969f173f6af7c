"""The memory below the device's: rows by id in a row store."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from npu_rec.embedding.key_map import KeyMap
from npu_rec.embedding.store import RowStore


class Tier:
    """Records (a row and its optimiser state) by id.

    Args:
        first_id: record n is that of id `first_id` + n; None: ids are any, and get records as they come.
    """

    def __init__(self, store: RowStore, first_id: int | None) -> None:
        self.store, self.first_id = store, first_id
        self.map = KeyMap()

    def holds(self, ids: Tensor) -> Tensor:
        """`[n]` bool."""
        if self.first_id is not None:
            return self.store.written(ids - self.first_id)
        return self.map.find(ids) >= 0

    def put(self, ids: Tensor, records: Tensor) -> None:
        """Keep `records [n, width]` of distinct `ids [n]`."""
        self.store.write(self._numbers(ids), records)

    def get(self, ids: Tensor) -> Tensor:
        """`[n, width]`."""
        return self.store.read(self._numbers(ids))

    def _numbers(self, ids: Tensor) -> Tensor:
        if self.first_id is not None:
            return ids - self.first_id
        numbers = self.map.find(ids)
        new = numbers < 0
        if bool(new.any()):
            numbers[new] = self.map.insert(ids[new])
        return numbers

    def items(self, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All ids and records, in pieces."""
        if self.first_id is not None:
            numbers = self.store.numbers_written()
            ids = numbers + self.first_id
        else:
            ids, numbers = self.map.items()
        for some, where in zip(ids.split(at_once), numbers.split(at_once), strict=True):
            if some.shape[0]:
                yield some, self.store.read(where)
