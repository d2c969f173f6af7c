"""What a rank of a training really holds on the fake npu, by its allocator and by the tensors alive.

Configurations and folders stand in `jobs.json` beside MEETING_POINT, as for train_ranks.py; `memory-<rank>.json` in
each folder has the answer: bytes by the names of `npu_rec.planning.simulate.Memory`, `hidden`, what is allocated
before a step beside the tensors that are alive, and `sent`, bytes of the device to other ranks in all_to_all, by name.
"""

import gc
import json
import os
import sys
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_ranks

from npu_rec.distributed import world
from npu_rec.ops import attention_tiles
from npu_rec.train import parallel, step, trainer

STEP = 2  # the one that is looked at; all states are there


def alive() -> dict[int, int]:
    """Bytes of each piece of device memory that a tensor of this process is in, by address."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, DTensor) and thing.device.type == "npu":
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


def size(*values: torch.Tensor | None) -> int:
    """Of the device memory that they are in, each piece once."""
    local = [x.to_local() if isinstance(x, DTensor) else x for x in values if x is not None]
    pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local if x.device.type == "npu"}
    return sum(pieces.values())


class Watch:
    """Stands between the trainer and its stepper."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, {}
        self.original, self.loss = step.Stepper.gradients, None
        self.made = parallel.DenseParallel.__init__
        self.exchange = world.World.all_to_all
        self.batch, self.sent = 0, {}

    def dense(self, dense: parallel.DenseParallel, *arguments: object, **more: object) -> None:
        self.made(dense, *arguments, **more)
        loss = dense.loss

        def watched(prepared: object) -> object:
            self.batch = size(*(x for x in tensors(prepared)))
            return loss(prepared)

        dense.loss = watched

    def all_to_all(self, ranks, send, counts, *rest):  # type: ignore[no-untyped-def]
        if send.device.type == "npu":
            others = send.nbytes - counts[ranks.rank] * send.nbytes // max(1, send.shape[0])
            self.sent[rest[-1]] = self.sent.get(rest[-1], 0) + others
        return self.exchange(ranks, send, counts, *rest)

    def gradients(self, stepper, group, lr, number, after_lookups):  # type: ignore[no-untyped-def]
        here = torch.accelerator.memory_allocated
        if number == STEP + 1:
            self.seen["peak"] = torch.accelerator.max_memory_allocated()
            (self.folder / f"memory-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(self.seen))
        if number != STEP:
            return self.original(stepper, group, lr, number, after_lookups)
        stepper.optimizer.zero_grad(set_to_none=True)
        torch.accelerator.reset_peak_memory_stats()
        task, seen = stepper.task, self.seen
        tables = list(task.tables.tables.values())
        weights = {table.weight for table in tables}
        state = stepper.optimizer.state
        rows = [x for t in tables if t.optimizer is not None for x in (t.optimizer.square, t.optimizer.momentum)]
        kept = [(p in weights, x) for p in task.parameters() for x in state[p].values() if p in state]
        others = [p for p in task.parameters() if p not in weights] + [b for b in task.buffers() if b not in weights]
        seen["tables"] = size(*weights)
        seen["table_states"] = size(*rows, *(x for own, x in kept if own))
        seen["parameters"] = size(*others)
        seen["optimizer_states"] = size(*(x for own, x in kept if not own))
        inside = self.loaded(group)
        gc.collect()
        start = here()
        buckets = start - sum(seen.values()) - inside  # all the rest is taken for DDP's: 5 % would show anything else
        seen["hidden"] = start - sum(alive().values())  # from Python; DDP's buckets may be
        self.sent.clear()
        forward = []
        result = self.original(stepper, group, lr, number, lambda: (forward.append(here()), after_lookups()))
        seen["sent"] = dict(self.sent)
        seen["gradients"] = size(*(p.grad for p in task.parameters()))
        seen["buffers"] = buckets + self.batch
        seen["activations"] = forward[0] - start - (self.batch - inside)
        return result

    @staticmethod
    def loaded(group: object) -> int:
        """Bytes of a batch that is on the device before the step."""
        return size(*(x for prepared in group for x in tensors(prepared)))


def tensors(value: object) -> list[torch.Tensor]:
    """Distinct pieces of device memory of a tree of dataclasses and mappings, a tensor each."""
    found: dict[int, torch.Tensor] = {}
    waiting = [value]  # no recursive function: it would be a cycle that holds the tensors
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.device.type == "npu" and value.numel():
                found[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, dict):
            waiting += value.values()
        elif hasattr(value, "__dataclass_fields__"):
            waiting += [getattr(value, name) for name in value.__dataclass_fields__ if name != "world"]
    return list(found.values())


attention_tiles.SCORES_AT_ONCE = 1 << 12  # its tiles, of a fixed size, are what planning leaves out


def _call(self: object, function, *arguments: object, **more: object) -> object:  # type: ignore[no-untyped-def]
    return function(self, *arguments, **more)


for job in json.loads((Path(os.environ["MEETING_POINT"]).parent / "jobs.json").read_text()):
    watch = Watch(Path(job["folder"]))
    with (
        patch.object(step.Stepper, "gradients", partialmethod(_call, watch.gradients)),
        patch.object(trainer.DenseParallel, "__init__", partialmethod(_call, watch.dense)),
        patch.object(world.World, "all_to_all", partialmethod(_call, watch.all_to_all)),
    ):
        train_ranks.run_jobs([train_ranks.Job(**job)])
