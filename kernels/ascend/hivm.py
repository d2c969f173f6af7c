"""Figures from the program (HIVM) in which Ascend's compiler leaves a kernel: on-chip memory, loops, vector code.

For A2 and A3 a program has structured loops and calls of library functions of the vector core. For the 950 it has
branches between blocks, and fuses operations into vector functions of its own, made of register instructions. Either
way a "full-tile operation" is one pass of one operation over the elements of a tile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

TILE_LOOP = 2  # the outermost loop deals out the work, those inside go over tiles
BUFFERS = {"ub": "ub", "cbuf": "l1", "cc": "l0c"}
# they move data, which has engines of its own, or set a register up
TRANSFERS = ("load_", "store_", "nd2nz_", "fixpipe_", "set_l1_", "copy_", "vld", "vst", "vbr")
# how a load or a store through computed addresses ends up: one element of a tile at a time
_SCALAR_ACCESS = re.compile(
    r"DiscreteMemAccess|memref\.(?:load|store) .*memref<(?!1x)[\dx]+x\w+, #hivm\.address_space<ub>>"
)

_FUNCTION = re.compile(r"func\.func (?:private )?@(\w+)")
_CALL = re.compile(r"\bcall @(\w+)\((.*?)\)")
_INSTRUCTION = re.compile(r"\"hivm_regbaseintrins\.intr\.hivm\.(v\w+)")
_LANES = re.compile(r"vector<(\d+)x(?!i1>)")  # of a register; masks are as long as the shortest elements need
_CAST = re.compile(r"(%\w+) = memref\.cast %\w+ : memref<([\dx]+)x\w+")
_LOOP = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
_CONSTANT = re.compile(r"(%\w+) = (?:arith|llvm\.mlir)\.constant[ (](-?\d+) : \w+")
_POINTER = re.compile(r"pointer_cast\((.*?)\)(?: \[\])? : memref<([\dx]+)x([a-z]+\d+), .*?address_space<(\w+)>>")
_BOUND = re.compile(r"arith\.cmpi slt, %\w+, (%\w+)")
_STEP = re.compile(r"arith\.addi %\w+, (%\w+)")
_BLOCK = re.compile(r"^\s*\^bb(\d+)")
_TARGET = re.compile(r"\^bb(\d+)")


@dataclass(frozen=True)
class Call:
    """A call of a library function.

    Attributes:
        elements: of its largest operand (of a gather: the indices), where shapes are known.
        depth: loops around it whose number of turns is not known when compiling.
        turns: of the other loops around it.
    """

    function: str
    elements: int
    core: str
    depth: int
    turns: int = 1


@dataclass(frozen=True)
class Program:
    """A lowered kernel.

    Attributes:
        cores: `cube`, `vector`, in the order of their functions.
        peaks: bytes used of `ub`, `l1`, `l0c`: where the last buffer ends.
        scalar_loads_in_loops: places in the text inside a loop that load or store one element at a time.
    """

    calls: tuple[Call, ...]
    cores: tuple[str, ...]
    peaks: dict[str, int]
    scalar_loads_in_loops: int

    def in_tile_loops(self, core: str) -> list[Call]:
        """The operations of a core in its loops over tiles, without transfers between memories.

        Where loops do not nest, the one that deals out the work is the one over tiles.
        """
        calls = [call for call in self.calls if call.core == core]
        depth = min(TILE_LOOP, max((call.depth for call in calls), default=0))
        return [call for call in calls if call.depth >= depth and not call.function.startswith(TRANSFERS)]

    def full_tile_operations(self, tile: int) -> int:
        """Vector operations in the loops over tiles, in passes over a tile of so many elements; smaller ones are free.

        A call that the two vector cores of a cube core share, each on half of the tile, counts as one.
        """
        weights = (call.elements * call.turns / tile for call in self.in_tile_loops("vector"))
        return sum(max(1, round(weight)) for weight in weights if weight >= 0.5)


def read_program(text: str) -> Program:
    """Read `module.hivm.opt.mlir`, one operation a line."""
    functions = dict(_functions(text.splitlines()))
    fused = {name: lines for name, lines in functions.items() if "hivm.vector_function" in lines[0]}
    calls: list[Call] = []
    cores: list[str] = []
    peaks: dict[str, int] = {}
    scalars = 0
    for name, lines in functions.items():
        core = _core(name, lines[0])
        if name in fused or not core:
            continue
        cores.append(core)
        peaks = {**peaks, **_peaks(lines)}
        sizes: dict[str, int] = {}
        for line, (depth, turns) in zip(lines, _depths(lines), strict=True):
            cast = _CAST.search(line)
            if cast:
                sizes[cast[1]] = _elements(cast[2])
            scalars += depth > 0 and _SCALAR_ACCESS.search(line) is not None
            call = _CALL.search(line)
            if call and call[1] in fused:
                calls += [Call(*instruction, core, depth, turns) for instruction in _instructions(fused[call[1]])]
            elif call:
                operands = [sizes[operand] for operand in re.findall(r"%\w+", call[2]) if operand in sizes]
                operands = operands[1:2] if call[1].startswith("gather") else operands
                calls.append(Call(call[1], max(operands, default=0), core, depth, turns))
    return Program(tuple(calls), tuple(dict.fromkeys(cores)), peaks, scalars)


def _functions(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each function with a body: its name and its lines, the first is its head."""
    begin = None
    for index, line in enumerate(lines):
        if line.startswith("  func.func") and line.endswith("{"):
            begin = index
        elif line.startswith("  }") and begin is not None:
            match = _FUNCTION.search(lines[begin])
            assert match is not None
            yield match[1], lines[begin : index + 1]
            begin = None


def _core(function: str, head: str) -> str:
    """Which core runs a function; empty for helpers of the host."""
    if "hacc.function_kind<HOST>" in head:
        return ""
    return "cube" if function.endswith("_mix_aic") or "func_core_type<AIC>" in head else "vector"


def _depths(lines: list[str]) -> list[tuple[int, int]]:
    """For each line of a function the loops around it of unknown length, and the turns of the others."""
    loops = _loops_of_blocks(lines) if any(_BLOCK.match(line) for line in lines) else _structured_loops(lines)
    found = []
    for index in range(len(lines)):
        around = [turns for begin, end, turns in loops if begin <= index <= end]
        found.append((around.count(None), prod(turns for turns in around if turns is not None)))
    return found


def _constants(lines: list[str]) -> dict[str, int]:
    return {name: int(value) for line in lines for name, value in _CONSTANT.findall(line)}


def _structured_loops(lines: list[str]) -> list[tuple[int, int, int | None]]:
    """(first line, last line, turns or None) of each loop."""
    constants, found = _constants(lines), []
    regions: list[tuple[int, int | None] | None] = []  # of a loop where it begins and its turns; None of anything else
    for index, line in enumerate(lines):
        if line.lstrip().startswith("}"):
            region = regions.pop()
            if region is not None:
                found.append((region[0], index, region[1]))
        if line.rstrip().endswith("{"):
            loop = _LOOP.search(line)
            begin, end, step = (constants.get(name) for name in loop.groups()) if loop else (None, None, None)
            known = begin is not None and end is not None and step
            turns = -((begin - end) // step) if begin is not None and end is not None and step else None
            regions.append((index, turns) if known or loop or "scf.while" in line else None)
    return found


def _loops_of_blocks(lines: list[str]) -> list[tuple[int, int, int | None]]:
    """The same for branches between blocks: a branch back to a block is a loop from there to here.

    Of unknown length when it does not count from 0 to a constant in constant steps.
    """
    constants = _constants(lines)
    begins = {int(label[1]): index for index, line in enumerate(lines) if (label := _BLOCK.match(line))}
    found = []
    for index, line in enumerate(lines):
        for target in _TARGET.findall(line) if "cf.br" in line or "cf.cond_br" in line else ():
            begin = begins.get(int(target), index)
            if begin < index:
                bound = _BOUND.search(lines[begin + 1])
                step = _STEP.search(lines[index - 1])
                most, by = (constants.get(match[1]) if match else None for match in (bound, step))
                found.append((begin, index, -(-most // by) if most is not None and by else None))
    return found


def _instructions(lines: list[str]) -> list[tuple[str, int]]:
    """(instruction, elements that it passes over in all) of a fused vector function."""
    found = []
    for line, (_, turns) in zip(lines, _depths(lines), strict=True):
        instruction, lanes = _INSTRUCTION.search(line), _LANES.search(line)
        if instruction and lanes:
            found.append((instruction[1], int(lanes[1]) * turns))
    return found


def _peaks(lines: list[str]) -> dict[str, int]:
    """From the planned addresses."""
    constants = _constants(lines)
    found: dict[str, int] = {}
    for addresses, shape, element, space in (match for line in lines for match in _POINTER.findall(line)):
        if space in BUFFERS:
            size = -(-_elements(shape) * int(re.sub(r"\D", "", element)) // 8)
            end = max(constants[name] for name in re.findall(r"%\w+", addresses)) + size
            found[BUFFERS[space]] = max(found.get(BUFFERS[space], 0), end)
    return found


def _elements(shape: str) -> int:
    return prod(int(n) for n in shape.split("x"))
