"""What one rank of test_distributed_context.py does, in a process of its own.

As a program it finds RANK, WORLD_SIZE and MEETING_POINT set. Beside the meeting point it leaves `rank-<r>.pt`:
{case: {"tokens", "out", gradients by name}}, on request also of one sequence of 8,192 tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from strategies import AttentionCase, forward_and_gradients, generator, normal
from torch import Tensor

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.device import get_device
from npu_rec.distributed import World, open_world
from npu_rec.distributed.context import ContextShard, context_shard
from npu_rec.distributed.context_attention import context_attention
from npu_rec.models.backbone import Layout
from npu_rec.models.hstu import HSTU, HSTUOptions
from npu_rec.ops import OPERATORS, Backend, RelativeBias
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import lengths_to_offsets, offsets_to_lengths

Results = dict[str, Tensor]

ATTENTION = {
    "jagged": AttentionCase((0, 1, 5, 37, 2, 129, 0, 70), bias="time"),
    "tied times": AttentionCase((66, 3), bias="time", times="tied", alpha=0.25, divisor=7.5),
    "targets": AttentionCase((9, 40, 3, 0, 90), (4, 7, 3, 0, 66), bias="time"),
    "window": AttentionCase((37, 5, 129), bias="position", max_attn_len=7),
    "window and targets": AttentionCase((37, 5, 129), (9, 5, 70), max_attn_len=20),
    "one token": AttentionCase((1,), bias="position"),
    "empty": AttentionCase((0, 0), bias="time"),
    "no sequences": AttentionCase((), bias="time"),
}


@dataclass(frozen=True)
class BackboneCase:
    """HSTU over sequences of `lengths`, with times and dropout."""

    lengths: tuple[int, ...]
    variant: str
    recompute: bool = False
    heads: int = 2
    backend: str = "auto"
    ablations: tuple[tuple[str, Any], ...] = ()

    def model(self) -> HSTU:
        config = ModelConfig(
            embedding_dim=16, num_blocks=2, num_heads=self.heads, attention_dim=8, linear_dim=8, dropout=0.2,
            max_seq_len=max(self.lengths), max_output_len=10,
        )  # fmt: skip
        torch.manual_seed(0)
        model = HSTU(
            config, HSTUOptions(variant=self.variant, **dict(self.ablations)), OpsConfig(hstu_attention=self.backend)
        )
        model.recompute = self.recompute
        for name, weight in model.named_parameters():
            if name.endswith(("position_weight", "time_weight")):
                torch.nn.init.normal_(weight)  # as large as the scores
        return model

    def inputs(self) -> dict[str, Tensor]:
        """By token `[T, ...]`; `grad` is that of the result."""
        seed, total = generator(3), sum(self.lengths)
        times = (torch.rand(total, generator=seed) * 14).exp().long().cumsum(0)
        return {
            "x": normal(seed, total, 16),
            "grad": normal(seed, total, 16),
            "times": times,
            "query_times": torch.cat([times[1:], times[-1:]]),
            "dropout_keys": torch.randint(-(2**62), 2**62, (total,), generator=seed),
        }

    def run(self, device: torch.device, dtype: torch.dtype, world: World | None) -> Results:
        """Result, and gradients of the input and of every weight; of all tokens where there is no world."""
        model = self.model().to(device, dtype)
        given = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in self.inputs().items()}
        offsets = lengths_to_offsets(torch.tensor(self.lengths)).to(device)
        shard: ContextShard | None = None
        if world is not None:
            shard = context_shard(world, offsets, given["times"])
            given = {name: shard.local(x) for name, x in given.items()}
            offsets = shard.offsets
        layout = Layout(
            offsets, max(self.lengths) + 10, given["times"], given["query_times"], None, given["dropout_keys"], shard
        )
        x = given["x"].requires_grad_()
        out = model(x, layout)
        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(out, [x, *weights.values()], given["grad"])
        results = {"out": out.detach(), **dict(zip(["x", *weights], grads, strict=True))}
        if shard is not None:
            results["tokens"] = shard.tokens
        return {name: value.cpu() for name, value in results.items()}


BACKBONES = {
    "research": BackboneCase((0, 1, 5, 37, 2, 90), "research"),
    "production": BackboneCase((70, 0, 3, 9), "production"),
    "recomputed": BackboneCase((70, 0, 3, 9), "research", recompute=True),
    "ablated": BackboneCase(
        (70, 0, 3, 9), "research", ablations=(("gate", False), ("norm", "rms"), ("residual", "post"))
    ),
}
LONG = BackboneCase((8192,), "research")


def attention_results(case: AttentionCase, device: torch.device, dtype: torch.dtype, world: World) -> Results:
    """This rank's part of what `case.run` gives."""
    offsets = lengths_to_offsets(torch.tensor(case.lengths, dtype=torch.int64)).to(device)
    query_time, key_time = (x.to(device) for x in case.query_and_key_times())
    shard = context_shard(world, offsets, key_time if case.bias == "time" else None)
    targets = None if case.num_targets is None else torch.tensor(case.num_targets, device=device)
    leaves = case.leaves(dtype, str(device))
    leaves = {name: shard.local(x) if name in "qkv" else x for name, x in leaves.items()}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    bias = None
    if case.bias != "none":
        times = (shard.local(query_time), shard.key_times) if case.bias == "time" else ()
        bias = RelativeBias(leaves["position_weight"], leaves.get("time_weight"), *times)
    out = context_attention(
        leaves["q"], leaves["k"], leaves["v"], shard,
        max_seq_len=case.max_seq_len, alpha=case.alpha, divisor=case.divisor, num_targets=targets,
        max_attn_len=case.max_attn_len, bias=bias,
    )  # fmt: skip
    whole = torch.empty(sum(case.lengths), case.heads, case.v_dim)
    grad = forward_and_gradients(lambda x: x * 1.0, {"x": whole}, case.seed)["x"]  # the gradient `case.run` draws
    grads = torch.autograd.grad(out, list(leaves.values()), shard.local(grad.to(device, dtype)))
    results = {"tokens": shard.tokens, "out": out.detach(), **dict(zip(leaves, grads, strict=True))}
    return {name: value.cpu() for name, value in results.items()}


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for its backward pass, a memory once."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        super().__init__(self._note, lambda x: x)

    def _note(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.of[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def total(self) -> int:
        return sum(self.of.values())


def count_pairs() -> list[int]:
    """From now on the (query, key) pairs of each pass of attention, causal; it runs on the fastest backend."""
    operator = OPERATORS["hstu_attention"]
    sample = HSTUAttentionRequest.sample(torch.device("cpu"))
    fastest = operator.select(sample, "auto")
    counted: list[int] = []

    def note(request: HSTUAttentionRequest) -> HSTUAttentionRequest:
        queries, keys = offsets_to_lengths(request.offsets_of_queries), offsets_to_lengths(request.offsets)
        counted.append(int((queries * keys - queries * (queries - 1) // 2).sum()))
        return request

    def forward(request: HSTUAttentionRequest) -> Any:
        return fastest.forward(note(request))

    def backward(request: HSTUAttentionRequest, grad: Tensor) -> Any:
        return fastest.backward(note(request), grad)

    operator.add(Backend("counting", forward, backward), before=fastest.name)
    return counted


def rank_process(rank: int, count: int, meeting_point: Path, long: bool) -> None:
    """One of `count` processes started by a function call."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MEETING_POINT=str(meeting_point))
    main(long=long)


def main(*, long: bool = False) -> None:
    meeting_point = Path(os.environ["MEETING_POINT"])
    device = get_device("ascend" if "FAKE_NPU_DEVICES" in os.environ else "cpu")
    dtype = torch.float64 if device.is_cpu else torch.float32
    at = device.torch_device
    torch.set_num_threads(1)
    with open_world(device, timeout=60.0, init_method=f"file://{meeting_point}") as world:
        results = {name: attention_results(case, at, dtype, world) for name, case in ATTENTION.items()}
        results |= {name: case.run(at, dtype, world) for name, case in BACKBONES.items()}
        if long:
            counted = count_pairs()
            saved = SavedBytes()
            with saved:
                results["long"] = LONG.run(at, torch.float32, world)
            results["work"] = {"pairs": torch.tensor(counted), "saved": torch.tensor(saved.total)}
        torch.save(results, meeting_point.parent / f"rank-{world.rank}.pt")


if __name__ == "__main__":
    main()
