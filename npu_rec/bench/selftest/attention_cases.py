"""Cases of `hstu_attention` and `softmax_attention`: jagged mixes, every mask, every kind of bias."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from npu_rec.bench.selftest.cases import Case, Tensors, differentiated, draw, draw_ints
from npu_rec.ops import RelativeBias, hstu_attention, softmax_attention
from npu_rec.ops.jagged import lengths_to_offsets

BUCKETS = 128
EPOCH = 1_600_000_000

# Events lie within 2^24 s: such differences are exact in float32, with which a device may compare time buckets.
SPAN = 2**23

MIXED = (17, 0, 1, 40)
Shape = tuple[str, Sequence[int], int, tuple[int, int, int], dict[str, Any]]
"""Label, lengths, N, (heads, Dqk, Dv), options: without `times` there is no bias; None: a bias by position alone."""

SHAPES: tuple[Shape, ...] = (
    ("no tokens", (), 8, (2, 16, 16), {"times": "sorted"}),
    ("empty sequences", (0, 0), 8, (1, 16, 16), {"times": "sorted"}),
    ("one token", (1,), 1, (1, 16, 16), {}),
    ("mixed lengths", MIXED, 64, (2, 32, 32), {}),
    ("position bias", MIXED, 40, (2, 32, 32), {"times": None}),
    ("sorted times", MIXED, 64, (2, 32, 32), {"times": "sorted"}),
    ("tied times", MIXED, 64, (1, 32, 32), {"times": "tied"}),
    ("unsorted times", MIXED, 64, (1, 32, 32), {"times": "unsorted"}),
    ("block borders", (16, 32, 64, 63, 65, 128), 160, (1, 64, 64), {"times": "sorted"}),
    ("odd widths", (33, 7), 48, (3, 25, 13), {"times": "sorted"}),
    ("wide heads", (70, 3), 80, (1, 128, 128), {"times": "sorted"}),
    ("not causal", MIXED, 64, (2, 32, 32), {"causal": False, "times": "sorted"}),
    ("targets", MIXED, 64, (2, 32, 32), {"targets": (3, 0, 1, 8), "times": "sorted"}),
    ("context", (17, 6, 40), 64, (2, 32, 32), {"contextual_seq_len": 5, "times": "sorted"}),
    ("window", (50, 2, 21), 64, (2, 32, 32), {"max_attn_len": 9}),
    ("window, full rows", (50, 2, 21), 64, (2, 32, 32), {"max_attn_len": 9, "min_full_attn_seq_len": 6}),
    (
        "all masks",
        (50, 8, 21),
        64,
        (2, 32, 32),
        {"targets": (5, 1, 2), "contextual_seq_len": 3, "max_attn_len": 9, "min_full_attn_seq_len": 6}
        | {"times": "sorted"},
    ),
)

DRAWN = 12


def cases(operator: Callable[..., Tensor]) -> list[Case]:
    """Of `hstu_attention` or `softmax_attention`: the table above, then shapes and masks by chance."""
    shapes = (*SHAPES, *(_drawn(random.Random(i), i) for i in range(DRAWN)))
    return [_case(operator, seed, *shape) for seed, shape in enumerate(shapes)]


def _drawn(chance: random.Random, number: int) -> Shape:
    lengths = [chance.choice((0, 1, chance.randrange(2, 90))) for _ in range(chance.randrange(1, 7))]
    options: dict[str, Any] = {"causal": chance.random() < 0.8}
    if chance.random() < 0.7:
        options["times"] = chance.choice((None, "sorted", "tied", "unsorted"))
    if chance.random() < 0.5:
        options["targets"] = [chance.randrange(min(length, 6) + 1) for length in lengths]
    if chance.random() < 0.4:  # every sequence has its context
        options["contextual_seq_len"] = 4
        lengths = [4 + length + 6 for length in lengths]
    if chance.random() < 0.4:
        options |= {"max_attn_len": chance.randrange(1, 40), "min_full_attn_seq_len": chance.choice((0, 5))}
    sizes = (chance.randrange(1, 4), chance.choice((8, 16, 25, 32, 50, 64)), chance.choice((8, 16, 25, 32, 50, 64)))
    return f"draw {number}", lengths, max(*lengths, 1) + chance.randrange(20), sizes, options


hstu_attention_cases = partial(cases, hstu_attention)
softmax_attention_cases = partial(cases, softmax_attention)


def _case(
    operator: Callable[..., Tensor],
    seed: int,
    label: str,
    lengths: Sequence[int],
    n: int,
    sizes: tuple[int, int, int],
    options: dict[str, Any],
) -> Case:
    heads, key_dim, value_dim = sizes
    total = sum(lengths)
    floats = {
        "q": draw(3 * seed, total, heads, key_dim) / key_dim**0.25,
        "k": draw(3 * seed + 1, total, heads, key_dim) / key_dim**0.25,
        "v": draw(3 * seed + 2, total, heads, value_dim),
    }
    indices = {"offsets": lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))}
    constants = {name: value for name, value in options.items() if name not in ("times", "targets")}
    if "targets" in options:
        indices["num_targets"] = torch.tensor(options["targets"])
    if "times" in options:
        floats["position_weight"] = draw(50 + seed, 2 * n - 1) * 0.3
    if options.get("times") is not None:
        floats["time_weight"] = draw(80 + seed, BUCKETS + 1) * 0.3
        indices |= _times(options["times"], seed, lengths)
    # half of the cases as under autocast, where parameters stay float32, half with all in one precision
    parameters = ("position_weight", "time_weight") if seed % 2 == 0 else ()
    call = partial(_attend, operator, {"max_seq_len": n, **constants})
    return Case(label, floats, indices, differentiated(call), parameters)


def _attend(
    operator: Callable[..., Tensor], constants: dict[str, Any], tensors: Tensors, backend: str
) -> tuple[Tensor, ...]:
    bias = None
    if "position_weight" in tensors:
        bias = RelativeBias(
            tensors["position_weight"], *(tensors.get(name) for name in ("time_weight", "query_time", "key_time"))
        )
    q, k, v, offsets = (tensors[name] for name in ("q", "k", "v", "offsets"))
    return (
        operator(
            q, k, v, offsets, bias=bias, num_targets=tensors.get("num_targets"), backend=backend, **constants
        ),
    )  # fmt: skip


def _times(kind: str, seed: int, lengths: Sequence[int]) -> Tensors:
    """`key_time` and `query_time` [T]: of the event itself and of the next one."""
    keys, queries = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for i, length in enumerate(lengths):
        times = EPOCH + draw_ints(100 * seed + i, 0, 3 if kind == "tied" else SPAN, length)
        times = times if kind == "unsorted" else times.sort().values
        keys.append(times)
        queries.append(torch.cat([times[1:], times[-1:] + 60]))
    return {"key_time": torch.cat(keys), "query_time": torch.cat(queries)}
