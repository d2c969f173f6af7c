"""64-bit keys to the rows of an array: slots 0, 1, 2, ..., on the host."""

from __future__ import annotations

import sys
from typing import Literal, Protocol

import torch
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops.compiled import extension, unusable

KeyMapBackend = Literal["auto", "cpp", "python"]


class KeyMap:
    """A map from keys, any int64 values, to slots; both are int64 tensors on the CPU.

    New keys get the slots that erased ones left, the last one left first, then 0, 1, 2, ...: so slots depend on
    nothing but the sequence of calls. A call that raises ValueError changes nothing. Lookups may run beside each
    other, a change beside nothing.

    Args:
        backend: `cpp` (kernels/cpu/key_map.cpp), `python`, the same with a dict, or `auto`: the first that is there.

    Raises:
        ValueError: the backend is unknown.
        BackendError: `cpp` is asked for and was not built.
    """

    def __init__(self, backend: KeyMapBackend = "auto") -> None:
        if backend not in ("auto", "cpp", "python"):
            raise ValueError(f"unknown backend of a key map {backend!r}; known: auto, cpp, python")
        if backend == "cpp" and extension() is None:
            raise BackendError(f"key map: the backend cpp cannot run: {unusable()}")
        self.backend = "python" if backend == "python" or extension() is None else "cpp"
        self._map: _Map = _DictMap() if self.backend == "python" else extension().KeyMap()

    def find(self, keys: Tensor) -> Tensor:
        """`keys [U]`, which may repeat -> slots `[U]`, -1 where a key is absent."""
        return self._map.find(keys)

    def insert(self, keys: Tensor) -> Tensor:
        """Slots `[U]` for `keys [U]`, distinct and absent.

        Raises:
            ValueError: a key is there already, or twice among these.
        """
        return self._map.insert(keys)

    def erase(self, keys: Tensor) -> Tensor:
        """The slots `[U]` that `keys [U]`, distinct and present, leave.

        Raises:
            ValueError: a key is absent, or twice among these.
        """
        return self._map.erase(keys)

    def items(self) -> tuple[Tensor, Tensor]:
        """Keys `[n]` and slots `[n]`, by slot."""
        return self._map.items()

    def __len__(self) -> int:
        return len(self._map)

    @property
    def slot_limit(self) -> int:
        """One more than the highest slot ever given."""
        return self._map.slot_limit

    @property
    def load_factor(self) -> float:
        """Entries over places of the hash array, at most 3/4."""
        return self._map.load_factor

    @property
    def memory_bytes(self) -> int:
        """Memory of the map itself."""
        return self._map.memory_bytes


class _Map(Protocol):
    def find(self, keys: Tensor) -> Tensor: ...
    def insert(self, keys: Tensor) -> Tensor: ...
    def erase(self, keys: Tensor) -> Tensor: ...
    def items(self) -> tuple[Tensor, Tensor]: ...
    def __len__(self) -> int: ...
    @property
    def slot_limit(self) -> int: ...
    @property
    def load_factor(self) -> float: ...
    @property
    def memory_bytes(self) -> int: ...


class _DictMap:
    """The reference. Its load factor is that of the hash array which C++ would have, so that both log the same."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._freed: list[int] = []
        self._places = 16
        self.slot_limit = 0

    def find(self, keys: Tensor) -> Tensor:
        return _int64([self._slots.get(key, -1) for key in _values(keys)])

    def insert(self, keys: Tensor) -> Tensor:
        values = _values(keys)
        while (len(self) + len(values)) * 4 > self._places * 3:
            self._places *= 2
        seen: set[int] = set()
        for key in values:
            if key in self._slots or key in seen:
                raise ValueError(f"key {key} is in the map already, or twice among those to insert")
            seen.add(key)
        for key in values:
            self._slots[key] = self._freed.pop() if self._freed else self.slot_limit
            self.slot_limit = max(self.slot_limit, self._slots[key] + 1)
        return self.find(keys)

    def erase(self, keys: Tensor) -> Tensor:
        values = _values(keys)
        seen: set[int] = set()
        for key in values:
            if key not in self._slots or key in seen:
                raise ValueError(f"key {key} is not in the map, or twice among those to erase")
            seen.add(key)
        slots = [self._slots.pop(key) for key in values]
        self._freed += slots
        return _int64(slots)

    def items(self) -> tuple[Tensor, Tensor]:
        by_slot = sorted(self._slots.items(), key=lambda item: item[1])
        return _int64([key for key, _ in by_slot]), _int64([slot for _, slot in by_slot])

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def load_factor(self) -> float:
        return len(self) / self._places

    @property
    def memory_bytes(self) -> int:
        numbers = 2 * len(self._slots) + len(self._freed)
        return sys.getsizeof(self._slots) + sys.getsizeof(self._freed) + numbers * sys.getsizeof(1 << 40)


def _values(keys: Tensor) -> list[int]:
    if keys.dim() != 1 or keys.dtype != torch.int64 or keys.device.type != "cpu":
        raise ValueError(f"keys must be [U] int64 on the CPU, got {list(keys.shape)} {keys.dtype} on {keys.device}")
    values: list[int] = keys.tolist()
    return values


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
