"""Compiles the Triton kernels of a call for GPUs that are not there, with the compiler that comes with Triton.

Python must run without TRITON_INTERPRET. As a program it prints a JSON list:
`python tests/triton_compile.py small` or `... attention`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from npu_rec.kernels.triton import attention, embedding, norm_gate, sampled_softmax

ARCHITECTURES = (80, 90)
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    kernel: str
    architecture: int
    shared: int  # bytes
    cubin: int  # bytes
    atomics: bool


def compile_launch(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Compiled]:
    """Compile as the launch `kernel[grid](*arguments, **options)` would, for each architecture."""
    given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **options}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(index,)] = [["tt.divisibility", 16]]
    results = []
    for architecture in ARCHITECTURES:
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=given)
        atomics = re.search(r"\b(atom|red)\.", built.asm["ptx"]) is not None
        results.append(Compiled(kernel.__name__, architecture, built.metadata.shared, len(built.asm["cubin"]), atomics))
    return results


def compiled(call: Callable[[], object]) -> list[Compiled]:
    """What the launches of `call` compile to; nothing runs, so that its results are not to be used."""
    results: list[Compiled] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        results.extend(compile_launch(kernel, arguments, options))

    with patch.object(triton.runtime.jit.JITFunction, "run", run):
        call()
    return results


def norm_gate_calls(tokens: int, width: int, dtype: torch.dtype) -> None:
    x, parameter, keys = torch.zeros(tokens, width, dtype=dtype), torch.zeros(width), torch.zeros(tokens).long()
    for weight, given_keys in ((None, None), (parameter, keys)):
        norm_gate.forward(x, x, weight, weight, given_keys, 1e-6, 0.2)
        norm_gate.backward(x, x, x, weight, weight, given_keys, 1e-6, 0.2)


def sampled_softmax_calls(tokens: int, width: int, dtype: torch.dtype) -> None:
    queries, rows = torch.zeros(tokens, width, dtype=dtype), torch.zeros(2 * tokens - 1, width, dtype=dtype)
    positives, negatives = torch.zeros(tokens).long(), torch.zeros(tokens, 2 * tokens - 1).long()
    for log_q, mask_collisions in ((torch.zeros(2 * tokens - 1), True), (None, False)):
        rest = (queries, rows, positives, negatives, log_q, 0.05, mask_collisions)
        sampled_softmax.forward(*rest)
        sampled_softmax.backward(torch.zeros(tokens), torch.zeros(tokens), *rest)


def embedding_calls(tokens: int, width: int, dtype: torch.dtype) -> None:
    table, grad = torch.zeros(2 * tokens - 1, width, dtype=dtype), torch.zeros(tokens, width, dtype=dtype)
    ids, square, momentum = torch.zeros(tokens).long(), torch.zeros(2 * tokens - 1), torch.zeros(table.shape)
    embedding.lookup(table, ids)
    embedding.gradient(grad, ids, table.shape[0])
    rest = (0.1, (0.9, 0.999), (0.1, 0.001), 1e-8)
    embedding.update(table, grad, ids, "sgd", *rest, None, None, None)
    embedding.update(table, grad, ids, "rowwise_adagrad", *rest, None, square, None)
    embedding.update(table, grad, ids, "rowwise_adam", *rest, 1.0, square, momentum)


def attention_calls(width: int, dtype: torch.dtype, everything: bool) -> None:
    x, table, times = torch.zeros(64, 4, width, dtype=dtype), torch.zeros(129), torch.zeros(64).int()
    offsets, targets = torch.tensor([0, 64]), torch.tensor([8]) if everything else None
    masks = (True, 3, 20, 5) if everything else (True, 0, 0, 0)
    call = attention.Attention(
        x, x, x, offsets, targets, table[:127], table, times, times, torch.zeros(130).int(), 64, 0.1, 64.0, *masks
    )
    attention.forward(call)
    attention.backward(call, x)


def compile_attention() -> list[dict[str, Any]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [(64, bf16, False), (50, bf16, True), (128, bf16, False), (256, bf16, True), (64, fp32, False)]
    return [
        {"width": width, "dtype": str(dtype), "everything": everything, **asdict(result)}
        for width, dtype, everything in cases
        for result in compiled(partial(attention_calls, width, dtype, everything))
    ]


def compile_small_operators() -> list[dict[str, Any]]:
    rows = []
    widest = {norm_gate_calls: 8192, sampled_softmax_calls: 1024, embedding_calls: 1024}
    for (calls, limit), dtype in product(widest.items(), (torch.float32, torch.bfloat16)):
        for tokens, width in ((1, 1), (64, 50), (64, limit)):  # an argument of 1 is compiled in
            for result in compiled(partial(calls, tokens, width, dtype)):
                rows.append({"operator": calls.__name__, "width": width, "dtype": str(dtype), **asdict(result)})
    return rows


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    groups = {"small": compile_small_operators, "attention": compile_attention}
    print(json.dumps(groups[sys.argv[1]]()))


if __name__ == "__main__":
    main()
