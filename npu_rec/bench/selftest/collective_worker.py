"""One process of the collectives check: `python -m npu_rec.bench.selftest.collective_worker DEVICE FOLDER`.

RANK, LOCAL_RANK and WORLD_SIZE are set. Writes FOLDER/<rank>.json: by name `detail`, `figures` and `error`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from npu_rec.bench.selftest.check import Figures
from npu_rec.device import Device, get_device

TIMEOUT = timedelta(seconds=200)  # of one collective
REPEATS = 5


@dataclass(frozen=True)
class Rank:
    """This process among `world`."""

    rank: int
    world: int
    device: Device

    def full(self, size: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[size]` of one value on the device."""
        return torch.full((size,), value, dtype=dtype, device=self.device.torch_device)

    def barrier(self) -> str:
        dist.barrier()
        return "all ranks met"

    def broadcast(self) -> str:
        for dtype in (torch.float32, torch.int64):
            x = self.full(1000, self.rank + 5, dtype)
            dist.broadcast(x, src=self.world - 1)
            _expect(x, self.full(1000, self.world + 4, dtype))
        return "float32 and int64 of the last rank"

    def all_reduce(self) -> str:
        for dtype in (torch.float32, torch.bfloat16):
            x = self.full(1001, self.rank + 1, dtype)
            dist.all_reduce(x)
            _expect(x, self.full(1001, self.world * (self.world + 1) / 2, dtype))
        x = self.full(3, self.rank)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        _expect(x, self.full(3, self.world - 1))
        return "sums in float32 and bfloat16, a maximum"

    def all_gather(self) -> str:
        parts = [self.full(100, -1) for _ in range(self.world)]
        dist.all_gather(parts, self.full(100, self.rank))
        _expect(torch.cat(parts), torch.cat([self.full(100, rank) for rank in range(self.world)]))
        return "100 numbers of each rank"

    def reduce_scatter(self) -> str:
        own = self.full(100, -1)
        dist.reduce_scatter(own, [self.full(100, self.rank + 10 * part) for part in range(self.world)])
        _expect(own, self.full(100, self.world * (self.world - 1) / 2 + 10 * self.rank * self.world))
        return "sums of 100 numbers for each rank"

    def all_to_all_single(self) -> str:
        """Rank r sends r + 2 s numbers to rank s; between some ranks none."""
        to = [self.rank + 2 * part for part in range(self.world)]
        back = [part + 2 * self.rank for part in range(self.world)]
        for dtype in (torch.float32, torch.int64):
            sent = torch.cat([self.full(size, 100 * self.rank + part, dtype) for part, size in enumerate(to)])
            received = self.full(sum(back), -1, dtype)
            dist.all_to_all_single(received, sent, back, to)
            right = [self.full(size, 100 * part + self.rank, dtype) for part, size in enumerate(back)]
            _expect(received, torch.cat(right))
        return "uneven parts, float32 and int64"

    def bandwidth(self) -> tuple[str, Figures]:
        """Bytes that each rank sends, a second (what NCCL's tests call bus bandwidth)."""
        mebibytes = 4 if self.device.is_cpu else 64
        x = self.full(mebibytes * 2**18 // self.world * self.world, 1.0)
        out, share = torch.empty_like(x), (self.world - 1) / self.world
        reduced = 2 * share * x.nbytes / self._seconds(lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX)) / 1e9
        exchanged = share * x.nbytes / self._seconds(lambda: dist.all_to_all_single(out, x)) / 1e9
        figures = {"all_reduce_gb_per_second": reduced, "all_to_all_gb_per_second": exchanged, "mebibytes": mebibytes}
        return f"all_reduce {reduced:.3g} GB/s, all_to_all {exchanged:.3g} GB/s, of {mebibytes} MiB a rank", figures

    def _seconds(self, collective: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS + 2):
            dist.barrier()
            self.device.synchronize()
            start = perf_counter()
            collective()
            self.device.synchronize()
            times.append(perf_counter() - start)
        return statistics.median(times[2:])


def _expect(found: Tensor, right: Tensor) -> None:
    if not torch.equal(found.cpu(), right.cpu()):
        raise ValueError(f"got {found.cpu().unique().tolist()[:8]}, expected {right.cpu().unique().tolist()[:8]}")


def main(device_name: str, folder: Path) -> None:
    """All collectives in turn."""
    device = get_device(device_name)  # type: ignore[arg-type]
    me = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
    dist.init_process_group(
        device.collective_backend, init_method=f"file://{folder / 'store'}", rank=me.rank, world_size=me.world,
        timeout=TIMEOUT,
    )  # fmt: skip
    collectives: tuple[Callable[[], str | tuple[str, Figures]], ...] = (
        me.barrier, me.broadcast, me.all_reduce, me.all_gather, me.reduce_scatter, me.all_to_all_single, me.bandwidth,
    )  # fmt: skip
    results = {}
    for collective in collectives:
        print(collective.__name__, flush=True)  # the last line of the log of a process that hangs
        result: dict[str, object] = {"detail": "", "figures": {}, "error": None}
        try:
            told = collective()
            result["detail"], result["figures"] = (told, {}) if isinstance(told, str) else told
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        results[collective.__name__] = result
    (folder / f"{me.rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
