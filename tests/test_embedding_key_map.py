"""`KeyMap`: the C++ backend against the one that is a dict, and what both promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.embedding import key_map
from npu_rec.embedding.key_map import KeyMap, KeyMapBackend
from npu_rec.errors import BackendError
from npu_rec.ops.compiled import extension

BACKENDS: tuple[KeyMapBackend, ...] = ("python",) if extension() is None else ("python", "cpp")
compiled = pytest.mark.skipif(extension() is None, reason="npu_rec was installed without its C++ kernels")

LOWEST, HIGHEST = -(2**63), 2**63 - 1
# few values, so that keys meet again; the extremes; and any
KEYS = st.one_of(st.integers(-30, 30), st.sampled_from([LOWEST, LOWEST + 1, HIGHEST]), st.integers(LOWEST, HIGHEST))
NAMES = st.sampled_from(["find", "insert", "erase", "insert absent", "erase present"])
CALLS = st.lists(st.tuples(NAMES, st.lists(KEYS, max_size=40)), max_size=30)


def keys_of(*keys: int) -> Tensor:
    return torch.tensor(keys, dtype=torch.int64)


def random_keys(count: int, seed: int) -> Tensor:
    """Distinct ones, in no order."""
    keys = torch.randint(LOWEST, HIGHEST, (count,), generator=torch.Generator().manual_seed(seed))
    return keys[torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))]


def answer(of: KeyMap, name: str, keys: Tensor) -> tuple[str, list[int]]:
    try:
        return "slots", getattr(of, name)(keys).tolist()
    except ValueError as error:
        return str(error).splitlines()[0], []


def assert_same(a: KeyMap, b: KeyMap) -> None:
    assert [x.tolist() for x in a.items()] == [x.tolist() for x in b.items()]
    assert (len(a), a.slot_limit, a.load_factor) == (len(b), b.slot_limit, b.load_factor)


@compiled
@examples(200)
@given(calls=CALLS)
def test_backends_agree_over_any_calls(calls: list[tuple[str, list[int]]]) -> None:
    fast, plain = KeyMap("cpp"), KeyMap("python")
    for call, drawn in calls:
        name, _, which = call.partition(" ")
        keys = keys_of(*drawn)
        if which:  # what `name` does not refuse
            keys = keys.unique()
            keys = keys[(plain.find(keys) >= 0) == (which == "present")]
        assert answer(fast, name, keys) == answer(plain, name, keys)
        assert_same(fast, plain)


@compiled
@examples(15)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.05, 0.5, 0.95]))
def test_backends_agree_when_crowded(seed: int, share: float) -> None:
    """Thousands of keys come and go in a full array, where entries stand far from their homes and move back."""
    generator = torch.Generator().manual_seed(seed)
    fast, plain = KeyMap("cpp"), KeyMap("python")
    for turn in range(8):
        new = random_keys(1500, seed + 7 * turn)
        assert fast.insert(new).tolist() == plain.insert(new).tolist()
        keys, _ = plain.items()
        gone = keys[torch.rand(len(keys), generator=generator) < share]
        assert fast.erase(gone).tolist() == plain.erase(gone).tolist()
        assert_same(fast, plain)
        asked = torch.cat([keys, random_keys(100, seed + turn + 1000)])
        assert fast.find(asked).tolist() == plain.find(asked).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_are_counted_up_and_given_again(backend: KeyMapBackend) -> None:
    keys = KeyMap(backend)
    assert keys.insert(keys_of(50, -7, HIGHEST, LOWEST)).tolist() == [0, 1, 2, 3]
    assert keys.find(keys_of(LOWEST, 0, 50, 50)).tolist() == [3, -1, 0, 0]
    assert keys.erase(keys_of(-7, 50)).tolist() == [1, 0]
    assert (len(keys), keys.slot_limit) == (2, 4)
    assert keys.find(keys_of(-7, HIGHEST)).tolist() == [-1, 2]
    assert keys.insert(keys_of(1, 2, 3)).tolist() == [0, 1, 4]  # the last one left first, then new ones
    assert [x.tolist() for x in keys.items()] == [[1, 2, HIGHEST, LOWEST, 3], [0, 1, 2, 3, 4]]
    assert keys.slot_limit == 5
    assert keys.load_factor == 5 / 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_call_changes_nothing(backend: KeyMapBackend) -> None:
    keys = KeyMap(backend)
    keys.insert(keys_of(1, 2, 3))
    keys.erase(keys_of(2))
    before = [x.tolist() for x in keys.items()]
    for wrong in ((9, 1), (9, 9)):
        with pytest.raises(ValueError, match=f"key {wrong[1]} is in the map already, or twice"):
            keys.insert(keys_of(*wrong))
    for wrong in ((1, 2), (3, 3)):
        with pytest.raises(ValueError, match=f"key {wrong[1]} is not in the map, or twice"):
            keys.erase(keys_of(*wrong))
    assert [x.tolist() for x in keys.items()] == before
    assert keys.slot_limit == 3
    assert keys.insert(keys_of(9, 8)).tolist() == [1, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_at_all(backend: KeyMapBackend) -> None:
    keys, none = KeyMap(backend), keys_of()
    for slots in (keys.find(none), keys.insert(none), keys.erase(none), *keys.items()):
        assert slots.shape == (0,)
        assert slots.dtype == torch.int64
    assert (len(keys), keys.slot_limit, keys.load_factor) == (0, 0, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3), torch.zeros(3).int()])
def test_other_tensors_are_refused(backend: KeyMapBackend, keys: Tensor) -> None:
    for name in ("find", "insert", "erase"):
        with pytest.raises(ValueError, match=r"keys must be \[U\] int64 on the CPU"):
            getattr(KeyMap(backend), name)(keys)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_with_gaps_in_memory(backend: KeyMapBackend) -> None:
    keys = KeyMap(backend)
    assert keys.insert(torch.arange(10)[::3]).tolist() == [0, 1, 2, 3]
    assert keys.items()[0].tolist() == [0, 3, 6, 9]


@compiled
def test_threads_find_what_one_finds() -> None:
    keys, there = KeyMap("cpp"), random_keys(60_000, 3)
    slots = keys.insert(there)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(keys.find(there), slots)
    finally:
        torch.set_num_threads(before)


@compiled
def test_memory_is_within_a_few_words_of_a_key() -> None:
    keys = KeyMap("cpp")
    empty = keys.memory_bytes
    keys.insert(random_keys(100_000, 5))
    assert empty < 1_000
    assert 16 * 100_000 / 0.75 <= keys.memory_bytes <= 2 * 16 * 100_000 / 0.75
    keys.erase(keys.items()[0][:50_000])
    assert keys.memory_bytes >= 16 * 100_000 / 0.75 + 8 * 50_000  # the slots that wait


def test_backend_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KeyMap("python").backend == "python"
    assert KeyMap().backend == BACKENDS[-1]
    monkeypatch.setattr(key_map, "extension", lambda: None)
    assert KeyMap().backend == "python"
    with pytest.raises(BackendError, match="cpp cannot run"):
        KeyMap("cpp")
    with pytest.raises(ValueError, match="unknown backend of a key map 'rust'"):
        KeyMap("rust")  # type: ignore[arg-type]
