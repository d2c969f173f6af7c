"""What is lowered for a chip: launches of every kernel for Ascend, at the shapes where it is largest.

The launches are those of the host code, recorded, so that what is lowered is what an NPU would be given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from npu_rec.kernels.ascend import attention, embedding, norm_gate, sampled_softmax
from npu_rec.kernels.triton.attention_call import Attention

PROGRAMS = 4  # any number: the grid is not part of a kernel


@dataclass(frozen=True)
class Case:
    """Calls of one operator."""

    operator: str
    name: str
    run: Callable[[], None]


def _name(width: int, dtype: torch.dtype, *parts: str) -> str:
    return ", ".join([f"D={width} {str(dtype).removeprefix('torch.')}", *(part for part in parts if part)])


MASKS = {
    "causal": (None, (True, 0, 0, 0)),
    "targets and window": (8, (True, 0, 20, 5)),
    "all masks": (8, (True, 3, 20, 5)),
}
"""Targets of the sequence, and (causal, context, window, full)."""


def _attention(width: int, dtype: torch.dtype, masks: str, bias: str) -> Callable[[], None]:
    def run() -> None:
        x, times = torch.zeros(64, 4, width, dtype=dtype), torch.arange(64).int()
        if "unsorted" in bias:
            times = times.flip(0)
        targets, rule = MASKS[masks]
        position = None if bias == "no bias" else torch.zeros(127)
        table = torch.zeros(129) if "time" in bias else None
        call = Attention(
            x, x, x, torch.tensor([0, 64]), None if targets is None else torch.tensor([targets]), position, table,
            times, times, torch.arange(130).int(), 64, 0.1, 64.0, *rule,
        )  # fmt: skip
        attention.forward(call, PROGRAMS)
        attention.backward(call, x, PROGRAMS)

    return run


def _attention_case(width: int, dtype: torch.dtype, masks: str, bias: str) -> Case:
    return Case("hstu_attention", _name(width, dtype, masks, bias), _attention(width, dtype, masks, bias))


def _norm_gate_case(width: int, dtype: torch.dtype, *, everything: bool) -> Case:
    """With weight, bias and dropout, or without."""

    def run() -> None:
        x = torch.zeros(8, width, dtype=dtype)
        weight, keys = (torch.zeros(width), torch.zeros(8, dtype=torch.int64)) if everything else (None, None)
        norm_gate.forward(x, x, weight, weight, keys, 1e-6, 0.2, PROGRAMS)
        norm_gate.backward(x, x, x, weight, weight, keys, 1e-6, 0.2, PROGRAMS)

    return Case("norm_gate", _name(width, dtype, "weight, bias and dropout" if everything else ""), run)


def _sampled_softmax_case(width: int, dtype: torch.dtype, *, everything: bool) -> Case:
    """With logQ correction and masked collisions, or without."""

    def run() -> None:
        x, numbers = torch.zeros(8, width, dtype=dtype), torch.zeros(8)
        positives, negatives = torch.zeros(8, dtype=torch.int64), torch.zeros(8, 32, dtype=torch.int64)
        rest = x, x, positives, negatives, numbers if everything else None, 0.05, everything, PROGRAMS
        sampled_softmax.forward(*rest)
        sampled_softmax.backward(numbers, numbers, *rest)

    return Case("sampled_softmax_loss", _name(width, dtype, "logQ, collisions masked" if everything else ""), run)


def _embedding_case(width: int, dtype: torch.dtype, rule: str, max_norm: float | None = None) -> Case:
    """A row optimiser, or `gradient`: the lookup and the table's gradient."""

    def run() -> None:
        x, ids = torch.zeros(8, width, dtype=dtype), torch.zeros(8, dtype=torch.int64)
        if rule == "gradient":
            embedding.lookup(x, ids, PROGRAMS)
            embedding.gradient(x, ids, 8, PROGRAMS)
        else:
            square = None if rule == "sgd" else torch.zeros(8)
            momentum = torch.zeros(8, width) if rule == "rowwise_adam" else None
            constants = 0.1, (0.9, 0.999), (0.1, 0.001), 1e-8, max_norm
            embedding.update(x, x, ids, rule, *constants, square, momentum, PROGRAMS)

    return Case("embedding_lookup", _name(width, dtype, rule, "" if max_norm is None else "max_norm"), run)


def cases() -> list[Case]:
    """Every kernel, in the order of the table."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    both = "position and time bias"
    return [
        _attention_case(64, bf16, "causal", "no bias"),
        _attention_case(64, bf16, "causal", "position bias"),
        _attention_case(64, bf16, "causal", both),
        _attention_case(64, bf16, "causal", f"{both}, unsorted times"),
        _attention_case(64, bf16, "targets and window", both),
        _attention_case(64, bf16, "all masks", both),
        _attention_case(50, fp16, "causal", both),
        _attention_case(25, fp32, "causal", "position bias"),
        _attention_case(25, fp32, "causal", both),
        _attention_case(64, fp32, "all masks", both),
        _attention_case(128, bf16, "all masks", both),
        _attention_case(256, bf16, "all masks", both),
        _attention_case(256, fp32, "targets and window", both),
        _norm_gate_case(50, fp32, everything=False),
        _norm_gate_case(50, fp32, everything=True),
        _norm_gate_case(256, bf16, everything=False),
        _norm_gate_case(256, bf16, everything=True),
        _norm_gate_case(2048, fp32, everything=True),
        _sampled_softmax_case(50, fp32, everything=False),
        _sampled_softmax_case(50, fp32, everything=True),
        _sampled_softmax_case(256, bf16, everything=False),
        _sampled_softmax_case(256, bf16, everything=True),
        _sampled_softmax_case(1024, fp32, everything=True),
        _embedding_case(50, fp32, "gradient"),
        _embedding_case(256, bf16, "gradient"),
        _embedding_case(50, fp32, "sgd"),
        _embedding_case(256, bf16, "sgd", max_norm=1.0),
        _embedding_case(50, fp32, "rowwise_adagrad"),
        _embedding_case(256, bf16, "rowwise_adagrad", max_norm=1.0),
        _embedding_case(50, fp32, "rowwise_adam"),
        _embedding_case(256, bf16, "rowwise_adam", max_norm=1.0),
        _embedding_case(1024, fp32, "rowwise_adam", max_norm=1.0),
    ]
