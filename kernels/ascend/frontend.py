"""The front end of triton-ascend: every launch of the catalogue, as text for Ascend's compiler.

A program of its own, for triton-ascend cannot share an environment with Triton: `lower.py` runs it with the folder
that holds triton-ascend first on the path. It prints one JSON list; nothing runs on a device, and there need be none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from npu_rec.kernels.ascend.catalogue import cases

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel as a launch specialises it.

    Attributes:
        constants: compile-time arguments.
        flags: of Ascend's compiler.
        text: the file with the kernel in linalg, or None, and then `reason` says why.
        without_time: the file with the same launch but for the time bias; None where there is none anyway.
    """

    operator: str
    case: str
    kernel: str
    constants: dict[str, Any]
    flags: list[str]
    text: str | None
    reason: str | None
    without_time: str | None


def recorded(run: Callable[[], None]) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that `run` launches, with their arguments by name; none is run."""
    launches: list[tuple[Any, dict[str, Any]]] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, {**dict(zip(kernel.arg_names, arguments, strict=False)), **options}))

    with patch.object(triton.runtime.jit.JITFunction, "run", record):
        run()
    return launches


def _arguments(kernel: Any, arguments: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(parameter, value) in the order of the parameters."""
    return [(parameter, arguments[parameter.name]) for parameter in kernel.params]


def _type(value: Tensor | float) -> str:
    """How Triton calls the type of an argument."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def options_of(arguments: dict[str, Any], chip: str) -> dict[str, Any]:
    """Options of triton-ascend: those of the launch over those it takes by itself on the chip."""
    on_950 = {"compile_on_910_95": True, "enable_auto_bind_sub_block": False, "enable_select_analysis": True}
    given = {"multibuffer": arguments["multibuffer"]} if "multibuffer" in arguments else {}
    return {**on_950, "multibuffer": False} if "950" in chip else given


def flags_of(arguments: dict[str, Any], chip: str) -> list[str]:
    """What triton-ascend passes on to Ascend's compiler."""
    options = {"multibuffer": True, "enable_auto_bind_sub_block": True, **options_of(arguments, chip)}
    return [
        f"--enable-auto-multi-buffer={options['multibuffer']}",
        f"--enable-auto-bind-sub-block={options['enable_auto_bind_sub_block']}",
    ]


def linalg(kernel: Any, arguments: dict[str, Any], chip: str) -> str:
    """The text that `bishengir-compile` takes."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter, value in _arguments(kernel, arguments):
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        else:
            signature[parameter.name] = _type(value)
    target = GPUTarget("npu", chip, 0)
    backend = backends["ascend"].compiler(target)
    options = backend.parse_options(options_of(arguments, chip))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=kernel, signature=signature, constants=constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"target": target, "hash": "", **vars(options)}
    # the backend's module is loaded by path: its functions are not those of the importable module
    stages = backend.add_stages.__globals__
    module = stages["make_ttir"](module, metadata, options)
    text = stages["ttir_to_linalg"](module, metadata, options, named_ops=True)
    parsed = stages["_parse_linalg_metadata"](text, metadata)
    return str(parsed[0] if isinstance(parsed, tuple) else parsed)


def write(folder: Path, name: str, kernel: Any, arguments: dict[str, Any], chip: str) -> tuple[str | None, str | None]:
    """(file, None), or (None, the first line of what is wrong)."""
    try:
        text = linalg(kernel, arguments, chip)
    except Exception as error:  # whatever the front end raises is what the table shows
        return None, f"triton-ascend: {next((x for x in reversed(str(error).splitlines()) if x.strip()), repr(error))}"
    path = folder / f"{name}.ttadapter"
    path.write_text(text, encoding="utf-8")
    return str(path), None


def main(folder: Path, chip: str, only: str) -> list[Launch]:
    """Lower the kernels whose name, `operator.kernel`, begins with `only`; each launch once."""
    found = []
    seen = set()
    for index, case in enumerate(cases()):
        for place, (kernel, arguments) in enumerate(recorded(case.run)):
            name = kernel.__name__.removesuffix("_kernel")
            if not f"{case.operator}.{name}".startswith(only):
                continue
            specialised = repr(
                [x if x is None or p.is_constexpr else _type(x) for p, x in _arguments(kernel, arguments)]
            )
            if (kernel.__name__, specialised) in seen:
                continue
            seen.add((kernel.__name__, specialised))
            text, reason = write(folder, f"{index}-{place}", kernel, arguments, chip)
            without = None
            if arguments.get("HAS_TIME"):
                timeless = {**arguments, "HAS_TIME": False, "SORTED": False}
                without, _ = write(folder, f"{index}-{place}-without", kernel, timeless, chip)
            constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
            flags = flags_of(arguments, chip)
            found.append(Launch(case.operator, case.name, name, constants, flags, text, reason, without))
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(launch) for launch in main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])]))
