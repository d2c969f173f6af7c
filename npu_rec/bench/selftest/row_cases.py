"""Cases of the operators over rows and tables."""

from __future__ import annotations

from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from npu_rec.bench.selftest.cases import Case, Tensors, differentiated, draw, draw_ints
from npu_rec.ops import (
    RowOptimizer,
    dropout,
    embedding_lookup,
    linear_silu,
    norm_gate,
    rms_norm,
    rotary,
    sampled_softmax_loss,
    swiglu,
)
from npu_rec.ops.row_optimizer import RowOptimizerName

SIZES = ((0, 16), (1, 16), (7, 33), (64, 50), (130, 64), (40, 512))
"""T and C: no rows, one, odd and even widths, more rows than a block has."""


def embedding_lookup_cases() -> list[Case]:
    """Lookups with repeated ids, and two updates in a row by each row optimiser."""
    cases = []
    for seed, (rows, dim, total) in enumerate(((9, 16, 0), (1, 16, 5), (12, 33, 40), (500, 64, 300), (70, 128, 64))):
        floats, indices = {"table": draw(seed, rows, dim)}, {"ids": draw_ints(seed, 0, rows, total)}
        cases.append(Case(f"V={rows} D={dim} T={total}", floats, indices, differentiated(_lookup)))
        for name in get_args(RowOptimizerName):
            max_norm = 0.5 if seed % 2 else None
            label = f"{name} V={rows} D={dim} T={total}"
            cases.append(Case(label, floats, indices, partial(_updated, name, max_norm)))
    return cases


def _lookup(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (embedding_lookup(tensors["table"], tensors["ids"], backend=backend),)


def _updated(
    name: RowOptimizerName, max_norm: float | None, tensors: Tensors, backend: str, dtype: torch.dtype
) -> Tensors:
    """The table and the optimiser's state after two updates."""
    table = tensors["table"].detach().clone().requires_grad_()
    optimizer = RowOptimizer(name, lr=0.1, max_norm=max_norm)
    for step in range(2):
        out = embedding_lookup(table, tensors["ids"], optimizer=optimizer, backend=backend)
        out.backward(draw(7 + step, *out.shape).to(dtype).to(out))
    state = {"square": optimizer.square, "momentum": optimizer.momentum}
    return {"table": table.detach(), **{key: value for key, value in state.items() if value is not None}}


def sampled_softmax_loss_cases() -> list[Case]:
    """With and without log_q, collisions counted and not."""
    cases = []
    for seed, (total, dim, rows, negatives) in enumerate(
        ((0, 16, 5, 4), (1, 16, 7, 3), (33, 25, 40, 17), (64, 64, 300, 128), (130, 50, 90, 32))
    ):
        floats = {
            "queries": normalize(draw(seed, total, dim)),
            "rows": normalize(draw(40 + seed, rows, dim)),
            "log_q": draw(60 + seed, rows).abs().neg(),
        }
        indices = {
            "positives": draw_ints(seed, 0, rows, total),
            "negatives": draw_ints(20 + seed, 0, rows, total, negatives),
        }
        for with_log_q, masked in ((False, True), (True, False)):
            used = floats if with_log_q else {name: floats[name] for name in ("queries", "rows")}
            label = f"T={total} D={dim} U={rows} R={negatives}{' log_q' if with_log_q else ''}"
            call = differentiated(partial(_loss, masked), constants=("log_q",))
            cases.append(Case(label, used, indices, call, ("log_q",)))
    return cases


def _loss(mask_collisions: bool, tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
    queries, rows, positives, negatives = (tensors[name] for name in ("queries", "rows", "positives", "negatives"))
    return (
        sampled_softmax_loss(
            queries, rows, positives, negatives, temperature=0.05, log_q=tensors.get("log_q"),
            mask_collisions=mask_collisions, backend=backend,
        ),
    )  # fmt: skip


def norm_gate_cases() -> list[Case]:
    """With and without parameters and dropout."""
    cases = []
    for seed, (total, width) in enumerate(SIZES):
        floats = {"x": draw(seed, total, width), "gate": draw(20 + seed, total, width)}
        weights = {"weight": draw(40 + seed, width), "bias": draw(60 + seed, width)}
        keys = {"dropout_keys": draw_ints(seed, 0, 2**62, total)}
        label = f"T={total} C={width}"
        cases.append(Case(label, floats, {}, differentiated(_norm_gate)))
        cases.append(
            Case(f"{label} weights, dropout", floats | weights, keys, differentiated(_norm_gate), tuple(weights))
        )
    return cases


def _norm_gate(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
    weight, bias, keys = (tensors.get(name) for name in ("weight", "bias", "dropout_keys"))
    return (norm_gate(tensors["x"], tensors["gate"], weight, bias, dropout=0.2, dropout_keys=keys, backend=backend),)


def dropout_cases() -> list[Case]:
    """All sizes."""
    return [
        Case(
            f"T={total} C={width}",
            {"x": draw(seed, total, width)},
            {"keys": draw_ints(seed, 0, 2**62, total)},
            differentiated(lambda tensors, backend: (dropout(tensors["x"], 0.2, tensors["keys"], backend=backend),)),
        )
        for seed, (total, width) in enumerate(SIZES)
    ]


def linear_silu_cases() -> list[Case]:
    """With and without a bias."""
    cases = []
    for seed, (total, width, splits) in enumerate(
        (
            (0, 16, (16, 16, 16, 16)),
            (1, 64, (64, 64, 64, 64)),
            (40, 50, (50, 50, 25, 25)),
            (70, 128, (64, 64, 128, 128)),
        )
    ):
        floats = {"x": draw(seed, total, width), "weight": draw(20 + seed, sum(splits), width) / width**0.5}
        if seed % 2:
            floats["bias"] = draw(40 + seed, sum(splits))
        call = differentiated(partial(_linear_silu, splits))
        cases.append(Case(f"T={total} K={width} N={sum(splits)}", floats, {}, call))
    return cases


def _linear_silu(splits: tuple[int, ...], tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
    return linear_silu(tensors["x"], tensors["weight"], tensors.get("bias"), splits=splits, backend=backend)


def rms_norm_cases() -> list[Case]:
    """All sizes."""
    return [
        Case(
            f"T={total} C={width}",
            {"x": draw(seed, total, width), "weight": draw(20 + seed, width)},
            {},
            differentiated(lambda tensors, backend: (rms_norm(tensors["x"], tensors["weight"], backend=backend),)),
            ("weight",) if seed % 2 else (),
        )
        for seed, (total, width) in enumerate(SIZES)
    ]


def rotary_cases() -> list[Case]:
    """Both ways to pair channels."""
    cases = []
    for seed, (total, heads, dim) in enumerate(((0, 2, 16), (1, 1, 16), (33, 3, 26), (70, 2, 64), (20, 2, 128))):
        angles = draw(seed, total, dim // 2)
        for interleaved in (False, True):
            both = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat([angles, angles], 1)
            floats = {"x": draw(20 + seed, total, heads, dim), "cos": both.cos(), "sin": both.sin()}
            call = differentiated(partial(_rotary, interleaved), constants=("cos", "sin"))
            label = f"T={total} H={heads} D={dim}{' interleaved' if interleaved else ''}"
            cases.append(Case(label, floats, {}, call))
    return cases


def _rotary(interleaved: bool, tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (rotary(tensors["x"], tensors["cos"], tensors["sin"], interleaved=interleaved, backend=backend),)


def swiglu_cases() -> list[Case]:
    """All sizes."""
    return [
        Case(
            f"T={total} C={width}",
            {"x": draw(seed, total, 2 * width)},
            {},
            differentiated(lambda tensors, backend: (swiglu(tensors["x"], backend=backend),)),
        )
        for seed, (total, width) in enumerate(SIZES)
    ]
