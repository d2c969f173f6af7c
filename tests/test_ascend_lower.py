"""Kernels for Ascend through Ascend's own compiler, for four chips; and what reads its output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, npu_rec

from npu_rec.bench.lowering import markdown
from npu_rec.errors import DeviceError
from npu_rec.kernels.ascend import lower as lowering
from npu_rec.kernels.ascend import tools
from npu_rec.kernels.ascend.hivm import read_program
from npu_rec.kernels.ascend.lower import CHIPS, Row, lower

PAGE = REPOSITORY / "docs" / "ascend-kernels.md"
needs_compilers = pytest.mark.skipif(tools.unsupported() is not None, reason=str(tools.unsupported()))


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return lower(install=True)


@needs_compilers
@pytest.mark.timeout(1800)
def test_every_kernel_lowers_within_capacity_on_every_chip(rows: list[Row]) -> None:
    assert {row.chip for row in rows} == set(CHIPS)
    assert {row.kernel.partition(".")[0] for row in rows} == {
        "hstu_attention",
        "sampled_softmax_loss",
        "norm_gate",
        "embedding_lookup",
    }
    assert {row.kernel for row in rows} >= {f"hstu_attention.{name}" for name in ("forward", "query", "key")}
    assert [(row.kernel, row.case, row.chip, row.reason) for row in rows if row.status != "lowered"] == []
    for row in rows:
        assert row.ub_peak_bytes is not None
        assert row.ub_capacity_bytes is not None
        assert 0 < row.ub_peak_bytes <= row.ub_capacity_bytes


@needs_compilers
def test_no_score_is_loaded_by_itself(rows: list[Row]) -> None:
    assert [row for row in rows if row.scalar_loads_in_loops] == []


@needs_compilers
def test_the_time_bias_costs_at_most_sixteen_passes_over_a_tile(rows: list[Row]) -> None:
    with_time = [row for row in rows if row.time_bias_vector_ops is not None]
    assert {(row.kernel, row.chip) for row in with_time} == {
        (f"hstu_attention.{kernel}", chip) for kernel in ("forward", "query", "key") for chip in CHIPS
    }
    assert [row for row in with_time if not 0 < (row.time_bias_vector_ops or 0) <= 16] == []


@needs_compilers
def test_the_page_shows_these_figures(rows: list[Row]) -> None:
    text = markdown(rows)
    assert PAGE.read_text(encoding="utf-8") == text, f"run npu-rec lower --table {PAGE.relative_to(REPOSITORY)}"


@needs_compilers
def test_command_prints_one_document() -> None:
    tools.install()
    done = npu_rec("lower", "--chip", "910B4", "--kernel", "hstu_attention.key", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rows"]
    assert {row["kernel"] for row in found} == {"hstu_attention.key"}
    assert {row["chip"] for row in found} == {"Ascend910B4"}
    assert all(row["status"] == "lowered" and row["reason"] is None for row in found)


@needs_compilers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "910C"), "unknown chip '910C': choose one of 910B1"),
        (("--chip", "910B1", "--kernel", "attention"), "no kernel's name, operator.kernel, begins with 'attention'"),
    ],
)
def test_wrong_names_are_one_line(arguments: Sequence[str], message: str) -> None:
    tools.install()
    done = npu_rec("lower", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: " + message)
    assert done.stderr.count("\n") == 1


def test_absent_compilers_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tools.VARIABLE, str(tmp_path))
    done = npu_rec("lower")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert tools.unsupported() is not None or "npu-rec lower --install" in done.stderr


@needs_compilers
def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setenv(tools.VARIABLE, str(tmp_path))
    done = npu_rec("lower", "--install")
    assert done.returncode == 2
    assert f"{tmp_path} holds something else" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_relative_folder_is_the_one_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tools.VARIABLE, "tools")
    assert tools.compiler("").is_relative_to(tmp_path.resolve() / "tools")


def test_a_python_without_triton_ascend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.sys, "version_info", (3, 12, 1))
    with pytest.raises(DeviceError, match=r"up to 3\.11"):
        tools.install()


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls of a compiler that makes STRUCTURED of everything but `bad`; its results are kept in `tmp_path`."""
    monkeypatch.setenv(tools.VARIABLE, str(tmp_path))
    for suffix in ("", "-a5"):
        tools.compiler(suffix).parent.mkdir(parents=True, exist_ok=True)
        tools.compiler(suffix).write_text("a compiler")
    calls: list[list[str]] = []

    def compile_(folder: Path, command: list[str], text: Path) -> dict[str, Any] | str:
        calls.append(command)
        return "no" if text.read_text() == "bad" else {"program": STRUCTURED, "multi_buffered": True}

    monkeypatch.setattr(lowering, "_compile", compile_)
    return calls


def test_what_was_compiled_is_not_compiled_again(counted: list[list[str]], tmp_path: Path) -> None:
    text = tmp_path / "text"

    def lowered(content: str, chip: str = "Ascend910B1", flag: str = "-a") -> Any:
        text.write_text(content)
        return lowering._Compiler(tmp_path).lower(chip, str(text), [flag])

    first = lowered("good")
    assert first == lowered("good") == lowering._Lowered(read_program(STRUCTURED), True)
    assert len(counted) == 1
    lowered("better"), lowered("good", "Ascend910B4"), lowered("good", flag="-b"), lowered("good", "Ascend950PR_9589")
    assert len(counted) == 5
    assert lowered("bad") == lowered("bad") == "no"
    assert len(counted) == 7
    (tmp_path / "ascendnpuir" / "bin" / "bishengir-compile").write_text("another compiler")
    lowered("good")
    assert len(counted) == 8
    for path in (tmp_path / "lowered").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert lowered("good") == first
    assert len(counted) == 9


STRUCTURED = """\
module {
  func.func @k_infer() -> i8 attributes {hacc.function_kind = #hacc.function_kind<HOST>} {
    func.call @vadd(%x) : ()
  }
  func.func private @vadd_1d_float(memref<?xf32>)
  func.func @k_mix_aiv(%arg0: i64) attributes {hivm.func_core_type = #hivm.func_core_type<AIV>} {
    %c0 = arith.constant 0 : index
    %c2 = arith.constant 2 : index
    %c1 = arith.constant 1 : index
    %c512_i64 = arith.constant 512 : i64
    %c4096_i64 = arith.constant 4096 : i64
    %0 = hivm.hir.pointer_cast(%c512_i64, %c4096_i64) : memref<32x32xf32, #hivm.address_space<ub>>
    scf.for %arg1 = %c0 to %arg0 step %c1 {
      %a = memref.load %work[%c0] : memref<1xi32, strided<[1], offset: ?>, #hivm.address_space<gm>>
      scf.for %arg2 = %c0 to %a step %c1 {
        %cast = memref.cast %0 : memref<1024xf32, #hivm.address_space<ub>> to memref<?xf32>
        %small = memref.cast %0 : memref<32xf32, #hivm.address_space<ub>> to memref<?xf32>
        func.call @vadd_1d_float(%cast, %cast) : (memref<?xf32>) -> ()
        func.call @vadd_1d_float(%small, %small) : (memref<?xf32>) -> ()
        func.call @load_gm_to_ubuf_1d_float(%cast) : (memref<?xf32>) -> ()
        func.call @gather_1d_float(%cast, %small, %small) : (memref<?xf32>) -> ()
        scf.for %arg3 = %c0 to %c2 step %c1 {
          %half = memref.cast %0 : memref<512xf32, #hivm.address_space<ub>> to memref<?xf32>
          func.call @vexp_1d_float(%half) : (memref<?xf32>) -> ()
        }
        scf.for %arg4 = %c0 to %b step %c1 {
          %v = memref.load %table[%i] {DiscreteMemAccess} : memref<?xf32, #hivm.address_space<gm>>
        }
      }
    } {some.attribute}
    return
  }
}
"""

BRANCHES = """\
module {
  func.func @k_vf_0(%arg0: memref<2048xf32, #hivm.address_space<ub>>) attributes {hivm.vector_function, no_inline} {
    %0 = llvm.mlir.constant(0 : i32) : i32
    %1 = llvm.mlir.constant(2048 : i32) : i32
    %2 = llvm.mlir.constant(64 : i32) : i32
    cf.br ^bb1(%0 : i32)
  ^bb1(%3: i32):  // 2 preds: ^bb0, ^bb2
    %4 = arith.cmpi slt, %3, %1 : i32
    cf.cond_br %4, ^bb2, ^bb3
  ^bb2:  // pred: ^bb1
    %5 = "hivm_regbaseintrins.intr.hivm.vldsx1.v64f32"(%p) : (!llvm.ptr<6>) -> vector<64xf32>
    %6 = "hivm_regbaseintrins.intr.hivm.vexp"(%5, %m) : (vector<64xf32>, vector<256xi1>) -> vector<64xf32>
    %9 = "hivm_regbaseintrins.intr.hivm.vcmp"(%5, %m) : (vector<64xf32>, vector<256xi1>) -> vector<256xi1>
    %7 = arith.addi %3, %2 overflow<nsw> : i32
    cf.br ^bb1(%7 : i32)
  ^bb3:  // pred: ^bb1
    return
  }
  func.func @k_mix_aiv(%arg0: i64) attributes {hivm.func_core_type = #hivm.func_core_type<AIV>} {
    %1 = llvm.mlir.constant(128 : i64) : i64
    %2 = hivm.hir.pointer_cast(%1) : memref<64xi32, #hivm.address_space<ub>>
    cf.br ^bb1(%x : i32)
  ^bb1(%8: i32):  // 2 preds: ^bb0, ^bb4
    cf.cond_br %9, ^bb2(%8 : i32), ^bb5
  ^bb2(%10: i32):  // 2 preds: ^bb1, ^bb3
    cf.cond_br %11, ^bb3, ^bb4
  ^bb3:  // pred: ^bb2
    call @k_vf_0(%2) {hivm.vector_function, no_inline} : (memref<2048xf32, #hivm.address_space<ub>>) -> ()
    memref.store %v, %t[%i, %j] : memref<32x32xf32, #hivm.address_space<ub>>
    memref.store %v, %s[] : memref<i32, #hivm.address_space<ub>>
    cf.br ^bb2(%12 : i32)
  ^bb4:  // pred: ^bb2
    cf.br ^bb1(%13 : i32)
  ^bb5:  // pred: ^bb1
    return
  }
}
"""


def test_structured_programs_are_read() -> None:
    program = read_program(STRUCTURED)
    assert program.cores == ("vector",)
    assert program.peaks == {"ub": 4096 + 4096}
    assert program.scalar_loads_in_loops == 1
    assert [(call.function, call.elements, call.turns) for call in program.in_tile_loops("vector")] == [
        ("vadd_1d_float", 1024, 1),
        ("vadd_1d_float", 32, 1),
        ("gather_1d_float", 32, 1),  # by its indices, not by its table
        ("vexp_1d_float", 512, 2),
    ]
    assert program.full_tile_operations(1024) == 2


def test_programs_of_branches_and_fused_functions_are_read() -> None:
    program = read_program(BRANCHES)
    assert program.cores == ("vector",)
    assert program.peaks == {"ub": 128 + 256}
    assert program.scalar_loads_in_loops == 1  # an element of a tile, not the one of a number
    assert [(call.function, call.elements, call.depth) for call in program.in_tile_loops("vector")] == [
        ("vexp", 2048, 2),
        ("vcmp", 2048, 2),
    ]
    assert program.full_tile_operations(1024) == 4
