"""Every backend of every operator, forward and backward, against the reference in float64 on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from npu_rec.bench.selftest import attention_cases, row_cases
from npu_rec.bench.selftest.cases import Case, Tensors
from npu_rec.bench.selftest.check import Check, CheckFailed, CheckSkipped, Figures, guarded, reason
from npu_rec.device import Device
from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, Backend

CASES: dict[str, Callable[[], list[Case]]] = {
    "hstu_attention": attention_cases.hstu_attention_cases,
    "softmax_attention": attention_cases.softmax_attention_cases,
    "sampled_softmax_loss": row_cases.sampled_softmax_loss_cases,
    "norm_gate": row_cases.norm_gate_cases,
    "dropout": row_cases.dropout_cases,
    "embedding_lookup": row_cases.embedding_lookup_cases,
    "linear_silu": row_cases.linear_silu_cases,
    "rms_norm": row_cases.rms_norm_cases,
    "rotary": row_cases.rotary_cases,
    "swiglu": row_cases.swiglu_cases,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of the largest entry of a tensor. Float32 arithmetic alone would allow 1e-5; matrix units that multiply float32 with
# shortened mantissas (TF32 by three products, Ascend's HF32) and sums in another order need the rest.
FLOAT32_LIMIT = 1e-4
UNITS = 4  # of the last place, in a lower precision, on top of twice the reference's own error


@dataclass(frozen=True)
class Expected:
    """One case in one precision: inputs, right results, and how far each may be off, as a share of its largest."""

    case: Case
    inputs: Tensors
    results: Tensors
    limits: dict[str, float]


def checks(device: Device) -> Iterator[Check]:
    """One check an operator, backend and precision; one for a backend that does not run here at all."""
    for name, operator in OPERATORS.items():
        for backend in operator.backends:
            yield from of_backend(name, backend, device)


def of_backend(operator: str, backend: Backend, device: Device) -> list[Check]:
    """The checks of one backend, registered with the operator of that name."""
    found = [
        guarded(
            "operators", f"{operator} {backend.name} {_name(dtype)}", partial(_check, operator, backend, dtype, device)
        )
        for dtype in DTYPES
    ]
    if all(check.status == "skipped" for check in found):
        return [replace(found[0], name=f"{operator} {backend.name}", seconds=sum(check.seconds for check in found))]
    return found


def _check(operator: str, backend: Backend, dtype: torch.dtype, device: Device) -> tuple[str, Figures]:
    if backend.by_name_only:
        raise CheckSkipped("runs only when asked for by name (an interpreter)")
    if operator not in CASES:
        raise CheckSkipped("the self-test has no cases of this operator")
    refusals: list[str] = []
    changing: set[str] = set()
    worst, allowed, where, count = 0.0, 1.0, "none", 0
    for expected in expectations(operator, dtype):
        place = device.torch_device
        inputs = {name: x.to(place) for name, x in (expected.inputs | expected.case.indices).items()}
        try:
            first, second = (expected.case.results(inputs, backend.name, dtype) for _ in range(2))
        except BackendError as error:
            refusals.append(reason(error))
            continue
        count += 1
        for name, right in expected.results.items():
            off = relative_error(first[name].cpu(), right)
            limit = expected.limits[name]
            if where == "none" or off / limit > worst / allowed:
                worst, allowed, where = off, limit, f"{expected.case.label}, {name}"
            if not _same_bits(first[name].cpu(), second[name].cpu()):
                changing.add(name)
    if count == 0:
        raise CheckSkipped(refusals[0])
    figures = {"shapes": count, "unsupported_shapes": len(refusals), "worst_error": worst, "allowed": allowed}
    seen = f"{count} shapes, worst error {worst:.1e} of the largest entry, {allowed:.1e} allowed ({where})"
    seen += f"; {len(refusals)} shapes not supported: {refusals[0]}" if refusals else ""
    if worst > allowed:
        raise CheckFailed(seen, figures)
    if not changing:
        return seen, figures
    seen += f"; the same call twice gave other bits: {', '.join(sorted(changing))}"
    # PyTorch's own gradients of gathered rows, and kernels of accelerators, may add in the order of arrival
    strict = device.is_cpu and backend.name != "reference"
    if strict or any(name.startswith("out") for name in changing):
        raise CheckFailed(seen, figures)
    return seen, figures


@cache
def expectations(operator: str, dtype: torch.dtype) -> list[Expected]:
    """What the reference says in float64 on the CPU, of inputs rounded to `dtype`.

    In a lower precision a result may be off by twice as much as the reference is in that precision, and by
    `UNITS` units of the last place (flash-attention's tests compare like this).
    """
    found = []
    for case in CASES[operator]():
        inputs = case.rounded(dtype)
        exact = case.results({k: x.double() for k, x in inputs.items()} | case.indices, "reference", dtype)
        limits = dict.fromkeys(exact, FLOAT32_LIMIT)
        if dtype != torch.float32:
            same = case.results(inputs | case.indices, "reference", dtype)
            unit = torch.finfo(dtype).eps / 2
            limits = {name: 2 * relative_error(same[name], right) + UNITS * unit for name, right in exact.items()}
        found.append(Expected(case, inputs, exact, limits))
    return found


def relative_error(found: Tensor, right: Tensor) -> float:
    """The largest difference over the largest entry; infinite for another shape or a number that is not finite."""
    if found.shape != right.shape or not bool(found.isfinite().all()):
        return float("inf")
    if right.numel() == 0:
        return 0.0
    difference = float((found.double() - right).abs().max())
    return difference / max(float(right.abs().max()), sys.float_info.min)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
