"""Row stores: the host's and the disk's against a dict, and what a disk can do to its file."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.embedding import record_file
from npu_rec.embedding.store import DiskStore, HostStore, RowStore
from npu_rec.errors import StorageError
from npu_rec.ops.compiled import extension

WIDTH, COUNT = 5, 1200
PATHS = ("python",) if extension() is None else ("python", "cpp")

NUMBERS = st.lists(st.one_of(st.integers(0, 20), st.integers(0, COUNT - 1)), max_size=30)
CALLS = st.lists(st.tuples(st.sampled_from(["read", "write", "written", "numbers_written"]), NUMBERS), max_size=25)


@pytest.fixture(params=PATHS)
def path_of_io(request: pytest.FixtureRequest) -> Iterator[str]:
    """Files are read and written by the compiled kernels, and by Python as without them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(record_file, "extension", lambda: None)
        yield request.param


def numbers_of(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def records_of(count: int, seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def scattered(count: int, below: int, seed: int = 0) -> Tensor:
    """Distinct ones, in no order."""
    numbers = torch.randint(0, below, (2 * count,), generator=torch.Generator().manual_seed(seed)).unique()
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return numbers[order[:count]]


class Plain:
    """A dict, as the others should be."""

    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}

    def call(self, name: str, numbers: list[int], records: Tensor) -> object:
        if name == "read":
            missing = [n for n in numbers if n not in self.rows]
            return f"record {missing[0]} was never written" if missing else [self.rows[n] for n in numbers]
        if name == "written":
            return [n in self.rows for n in numbers]
        if name == "numbers_written":
            return sorted(self.rows)
        if len(set(numbers)) < len(numbers):
            return f"record {min(n for n in numbers if numbers.count(n) > 1)} is twice among those to write"
        self.rows.update(zip(numbers, records.tolist(), strict=True))
        return None


def call(store: RowStore, name: str, numbers: list[int], records: Tensor) -> object:
    try:
        if name == "numbers_written":
            return store.numbers_written().tolist()
        if name == "write":
            return store.write(numbers_of(*numbers), records)  # type: ignore[func-returns-value]
        return getattr(store, name)(numbers_of(*numbers)).tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.usefixtures("path_of_io")
def test_disk_and_host_are_as_a_dict() -> None:
    @examples(60)
    @given(calls=CALLS, seed=st.integers(0, 1000))
    def check(calls: list[tuple[str, list[int]]], seed: int) -> None:
        plain, host = Plain(), HostStore(WIDTH)
        with tempfile.TemporaryDirectory() as folder:
            disk = DiskStore(Path(folder) / "rows", WIDTH, COUNT)
            for turn, (name, numbers) in enumerate(calls):
                records = records_of(len(numbers), seed + turn)
                expected = plain.call(name, numbers, records)
                assert call(host, name, numbers, records) == expected
                assert call(disk, name, numbers, records) == expected
            assert (host.bytes_read, host.bytes_written) == (disk.bytes_read, disk.bytes_written)
            disk.close()

    check()


def on_host(folder: Path) -> RowStore:
    return HostStore(WIDTH)


def on_disk(folder: Path) -> RowStore:
    return DiskStore(folder / "rows", WIDTH, 50_000)


@pytest.mark.parametrize("make", [on_host, on_disk])
def test_many_records_in_any_order_by_several_threads(make: Callable[[Path], RowStore], tmp_path: Path) -> None:
    store, numbers = make(tmp_path), scattered(20_000, 50_000)
    records = records_of(len(numbers), 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for part in torch.arange(len(numbers)).split(3_000):
            store.write(numbers[part], records[part])
        again = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(2))[:9_000]
        records[again] = records_of(9_000, 3)
        store.write(numbers[again], records[again])
        asked = torch.cat([again, again.flip(0)])
        assert torch.equal(store.read(numbers[asked]), records[asked])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(store.numbers_written(), numbers.sort().values)
    assert store.bytes_written == (20_000 + 9_000) * WIDTH * 4
    assert store.bytes_read == 18_000 * WIDTH * 4
    store.close()


@pytest.mark.parametrize("make", [on_host, on_disk])
def test_wrong_records_are_refused(make: Callable[[Path], RowStore], tmp_path: Path) -> None:
    store = make(tmp_path)
    for records in (torch.zeros(2, WIDTH + 1), torch.zeros(1, WIDTH), torch.zeros(2, WIDTH, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"records must be \[2, 5\] float32"):
            store.write(numbers_of(1, 2), records)
    assert store.numbers_written().tolist() == []
    store.close()


def test_records_with_gaps_in_memory(tmp_path: Path) -> None:
    store, records = on_disk(tmp_path), records_of(4, 0, 2 * WIDTH)[:, ::2]
    numbers = torch.arange(12)[::3]
    store.write(numbers, records)
    assert torch.equal(store.read(numbers[::2]), records[::2])
    store.close()


def test_memory_of_the_host_store_is_for_what_was_touched() -> None:
    store, width = HostStore(32), 32
    for turn in range(5):
        numbers = scattered(20_000, 100_000_000, turn)
        store.write(numbers, records_of(len(numbers), turn, width))
    touched = len(store.numbers_written())
    assert touched > 99_000
    assert touched * width * 4 <= store.memory_bytes <= touched * (width * 4 + 64)


@pytest.mark.usefixtures("path_of_io")
def test_a_sparse_file_takes_disk_for_what_was_touched(tmp_path: Path) -> None:
    """40 GB declared; a page or two for each of 500 records."""
    width = 100
    store = DiskStore(tmp_path / "rows", width, 100_000_000)
    numbers = scattered(500, 100_000_000)
    records = records_of(500, 0, width)
    store.write(numbers, records)
    with (tmp_path / "rows").open("rb") as opened:
        os.fsync(opened.fileno())  # until then the system may not have chosen blocks
    file = (tmp_path / "rows").stat()
    assert file.st_size == 40_000_000_000
    assert 500 * width * 4 <= file.st_blocks * 512 <= 500 * 2 * 4096 + (1 << 20)
    assert store.memory_bytes == 12_500_000  # a bit a record
    assert torch.equal(store.read(numbers), records)
    store.close()


_RESIDENT = """
import sys
from pathlib import Path
import torch
from npu_rec.embedding.store import DiskStore

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) * 1024

torch.set_num_threads(1)
store = DiskStore(Path(sys.argv[1]), 1000, 100_000)
records = torch.randn(1000, 1000)
def touch(first):
    store.write(torch.arange(first, first + 1000) * 3, records)
    assert torch.equal(store.read(torch.arange(first, first + 1000) * 3), records)
touch(0)
before = resident("VmHWM")
for first in range(1000, 30_000, 1000):
    touch(first)
store.close()
print(store.bytes_written, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_memory_of_the_process_does_not_grow_with_what_was_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RESIDENT, str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    written, grown = map(int, done.stdout.split())
    assert written == 120_000_000
    assert grown < 12_000_000


def test_a_store_begins_empty_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"1" * 100_000)  # what a killed process left
    store = DiskStore(path, WIDTH, COUNT)
    assert path.stat().st_size == 4 * WIDTH * COUNT
    assert store.numbers_written().tolist() == []
    store.write(numbers_of(7), records_of(1, 0))
    store.close()
    assert not list(tmp_path.iterdir())
    gone = DiskStore(path, WIDTH, COUNT)
    path.unlink()  # by somebody else
    gone.write(numbers_of(7), records_of(1, 0))
    assert torch.equal(gone.read(numbers_of(7)), records_of(1, 0))
    gone.close()


def test_numbers_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "rows", WIDTH, COUNT)
    for wrong in (-1, COUNT):
        for use in (store.read, store.written, lambda numbers: store.write(numbers, records_of(2, 0))):
            with pytest.raises(ValueError, match=rf"record {wrong} is outside of 0\.\.1199"):
                use(numbers_of(3, wrong))
    assert store.numbers_written().tolist() == []
    store.close()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    store = DiskStore(path, WIDTH, COUNT)
    for wrong, message in (
        (path, "another process has this file"),
        (tmp_path, "cannot be opened: Is a directory"),
        (tmp_path / "missing" / "rows", "cannot be opened: No such file or directory"),
    ):
        with pytest.raises(StorageError, match=message) as caught:
            DiskStore(wrong, WIDTH, COUNT)
        assert str(wrong) in str(caught.value)
        assert "\n" not in str(caught.value)
    store.close()


@pytest.mark.usefixtures("path_of_io")
def test_a_file_cut_off_under_an_open_store(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "rows", WIDTH, COUNT)
    store.write(numbers_of(2, 900), records_of(2, 0))
    with (tmp_path / "rows").open("rb+") as file:
        file.truncate(900 * WIDTH * 4 + 7)
    assert torch.equal(store.read(numbers_of(2)), records_of(2, 0)[:1])
    with pytest.raises(StorageError, match="rows: record 900 of 20 bytes cannot be read: the file ends before it"):
        store.read(numbers_of(2, 900))
    store.close()


@pytest.mark.usefixtures("path_of_io")
def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """The limit of the size of a file stands for a full disk: the system refuses to write."""
    store = DiskStore(tmp_path / "rows", WIDTH, COUNT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500 * WIDTH * 4 + 8, hard))
    try:
        with pytest.raises(StorageError, match="rows: record 500 of 20 bytes cannot be written: File too large"):
            store.write(numbers_of(3, 500), records_of(2, 0))
        store.write(numbers_of(4), records_of(1, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.numbers_written().tolist() == [4]
    store.close()
