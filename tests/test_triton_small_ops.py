"""`norm_gate`, `sampled_softmax_loss` and `embedding_lookup` in Triton: what the tests of every backend leave out.

They run on a GPU, or anywhere under the interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import (
    Place,
    assert_all_close,
    forward_and_gradients,
    generator,
    normal,
    one_thread,  # noqa: F401
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import RowOptimizer, embedding_lookup, norm_gate, sampled_softmax_loss
from npu_rec.ops.random import dropout_scale
from npu_rec.ops.triton_support import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
_accelerator = torch.accelerator.current_accelerator(check_available=True)
if not INTERPRETED and (_accelerator is None or _accelerator.type != "cuda"):
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from npu_rec.kernels.triton import sampled_softmax, segment_sum  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = Place(DEVICE, torch.float32).tolerance
RULES = ["sgd", "rowwise_adagrad", "rowwise_adam"]


def float64(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


# --- norm_gate


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_dropout_is_that_of_the_reference_bit_for_bit(probability: float) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (61,), generator=generator(0))
    keys = torch.cat([keys, torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**32, 2**31, -(2**31)])])
    ones = torch.ones(keys.shape[0], 131, device=DEVICE)  # a row of ones is normalised to zeros
    how = {"dropout": probability, "dropout_keys": keys.to(DEVICE)}
    out = norm_gate(ones, ones, bias=ones[0], **how, backend="triton")
    assert torch.equal(out.cpu(), dropout_scale(keys, 131, probability))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one number for all": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_gate_takes_rows_of_any_stride(layout: str) -> None:
    seed, keys = generator(0), torch.arange(37)
    x, gate, grad = (normal(seed, 37, 21) for _ in range(3))

    def run(backend: str, place: Place) -> dict[str, Tensor]:
        # a constant row has no gradient of x to speak of
        x_moved, gate_moved, grad_moved = (t.to(place.device, place.dtype) for t in (x, gate, grad))
        x_leaf = (x_moved if layout.startswith("one") else LAYOUTS[layout](x_moved)).detach().requires_grad_()
        gate_leaf = LAYOUTS[layout](gate_moved).detach().requires_grad_()
        moved_keys = keys.to(place.device)
        out = norm_gate(x_leaf, gate_leaf, dropout=0.2, dropout_keys=moved_keys, backend=backend)
        d_x, d_gate = torch.autograd.grad(out, [x_leaf, gate_leaf], LAYOUTS[layout](grad_moved))
        return {"out": float64(out), "x": float64(d_x), "gate": float64(d_gate)}

    expected = run("reference", Place("cpu", torch.float64))
    assert_all_close(run("triton", Place(DEVICE, torch.float32)), expected, TOLERANCE)


def test_gradients_of_weight_and_bias_over_more_blocks_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_rec.kernels.triton import norm_gate as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    seed = generator(1)
    leaves = {"x": normal(seed, 700, 33), "gate": normal(seed, 700, 33), "weight": normal(seed, 33)}
    leaves["bias"] = normal(seed, 33)

    def run(backend: str, place: Place) -> dict[str, Tensor]:
        moved = {name: leaf.to(place.device, place.dtype) for name, leaf in leaves.items()}
        return forward_and_gradients(lambda **given: norm_gate(**given, backend=backend), moved, 0)

    expected = run("reference", Place("cpu", torch.float64))
    assert_all_close(run("triton", Place(DEVICE, torch.float32)), expected, TOLERANCE)


# --- sampled_softmax_loss


def loss_arguments(tokens: int, negatives: int, rows: int, width: int) -> dict[str, Any]:
    seed = generator(rows)
    return {
        "queries": normal(seed, tokens, width) / width**0.5,
        "rows": normal(seed, rows, width) / width**0.5,
        "positives": torch.randint(rows, (tokens,), generator=seed),
        "negatives": torch.randint(rows, (tokens, negatives), generator=seed),
        "log_q": -3 * torch.rand(rows, generator=seed),
    }


def run_loss(arguments: dict[str, Any], backend: str, place: Place) -> dict[str, Tensor]:
    moved = {n: x.to(place.device, place.dtype) if x.is_floating_point() else x for n, x in arguments.items()}
    rest = {name: moved.pop(name).to(place.device) for name in ("positives", "negatives", "log_q")}
    return forward_and_gradients(
        lambda **leaves: sampled_softmax_loss(**leaves, **rest, temperature=0.3, backend=backend), moved, 0
    )


@pytest.mark.parametrize("at_once", [1, 30, 64])
@pytest.mark.parametrize("split_entries", [1, 5, 256])
def test_chunks_and_splits_of_any_size_give_the_same_loss(
    at_once: int, split_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = loss_arguments(13, 9, 5, 6)
    monkeypatch.setattr(sampled_softmax, "ENTRIES_AT_ONCE", at_once)
    monkeypatch.setattr(segment_sum, "SPLIT_ENTRIES", split_entries)
    expected = run_loss(arguments, "reference", Place("cpu", torch.float64))
    assert_all_close(run_loss(arguments, "triton", Place(DEVICE, torch.float32)), expected, TOLERANCE)


def test_few_rows_share_their_sums() -> None:
    assert segment_sum.splits_for(entries=1 << 20, count=4) == 256
    assert segment_sum.splits_for(entries=1 << 20, count=600) == 1
    assert segment_sum.splits_for(entries=1000, count=1) == 3
    assert segment_sum.splits_for(entries=100, count=5000) == 1


@pytest.mark.parametrize("count", [1, 7, 100, 2**31 + 5])
def test_segments_bring_equal_values_together_in_their_order(count: int) -> None:
    index = torch.randint(min(count, 30), (50,), generator=generator(2)) * max(1, (count - 1) // 30)
    values, order, bounds = segment_sum.segments_of(index, count)
    distinct = index.unique()
    assert torch.equal(index[order], values.long())
    assert bounds.shape == (min(50, count) + 1,)
    assert bounds[distinct.shape[0] :].eq(50).all()
    for value, begin, end in zip(distinct.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=False):
        assert order[begin:end].tolist() == (index == value).nonzero().flatten().tolist()


# --- embedding_lookup with an update


def trained(optimizer: dict[str, Any], table: Tensor, ids: Tensor, grad: Tensor, backend: str) -> dict[str, Tensor]:
    """Table and state after an update; `table` is changed in place."""
    rule = RowOptimizer(**optimizer)
    out = embedding_lookup(table.detach().requires_grad_(), ids.to(table.device), optimizer=rule, backend=backend)
    out.backward(grad.to(out))
    state = {"square": rule.square, "momentum": rule.momentum}
    return {name: float64(x) for name, x in {"table": table, **state}.items() if x is not None}


@pytest.mark.parametrize("rule", RULES)
def test_an_update_in_a_slice_of_columns_leaves_everything_else_alone(rule: str) -> None:
    seed = generator(3)
    whole, ids, grad = normal(seed, 30, 48).to(DEVICE), torch.randint(9, (40,), generator=seed), normal(seed, 40, 20)
    before = whole.clone()
    optimizer = {"name": rule, "lr": 0.1}
    actual = trained(optimizer, whole[:, 5:25], ids, grad, "triton")
    expected = trained(optimizer, before[:, 5:25].double().cpu().contiguous(), ids, grad, "reference")
    assert_all_close(actual, expected, TOLERANCE)
    changed = (whole != before).nonzero()
    assert set(changed[:, 0].tolist()) == set(ids.tolist())
    assert set(changed[:, 1].tolist()) == set(range(5, 25))


def test_many_lookups_of_few_rows_are_summed_whole() -> None:
    ids, grad = torch.arange(1000) % 3, normal(generator(5), 1000, 17)
    exact = torch.zeros(3, 17, dtype=torch.float64).index_add_(0, ids, grad.double())
    for optimizer in (None, RowOptimizer("sgd", lr=1.0)):
        table = torch.zeros(3, 17, device=DEVICE, requires_grad=True)
        embedding_lookup(table, ids.to(DEVICE), optimizer=optimizer, backend="triton").backward(grad.to(DEVICE))
        actual = table.grad if table.grad is not None else -table.detach()
        assert_all_close({"sum": float64(actual)}, {"sum": exact}, TOLERANCE)


# --- all three


def far_rows(values: Tensor) -> Tensor:
    """float16 `[3, C]` with 2^30 elements between the rows, of which only these are ever touched."""
    stride = 2**30
    storage = torch.empty(2 * stride + values.shape[1], dtype=torch.float16, device=DEVICE)
    far = storage.as_strided(values.shape, (stride, 1))
    return far.copy_(values)


def test_rows_beyond_2_to_the_31_elements_are_found() -> None:
    seed = generator(6)
    one, other, grad = (normal(seed, 3, 40).half().to(DEVICE) for _ in range(3))
    positives, negatives = torch.tensor([0, 2, 1], device=DEVICE), torch.tensor([[2], [0], [2]], device=DEVICE)

    def gated(x: Tensor, gate: Tensor) -> Tensor:
        return norm_gate(x, gate, backend="triton")

    def loss(queries: Tensor, rows: Tensor) -> Tensor:
        return sampled_softmax_loss(queries, rows, positives, negatives, temperature=1.0, backend="triton")

    for function, names in ((gated, ("x", "gate")), (loss, ("queries", "rows"))):
        far = dict(zip(names, (far_rows(one), far_rows(other)), strict=True))
        near = dict(zip(names, (one, other), strict=True))
        expected = forward_and_gradients(function, near, 0)
        assert_all_close(forward_and_gradients(function, far, 0), expected, 2e-3)
        del far

    ids, table = torch.tensor([2, 0, 2]), far_rows(one)
    assert torch.equal(embedding_lookup(table, ids.to(DEVICE), backend="triton"), one[ids.to(DEVICE)])
    far, near = (trained({"name": "rowwise_adam", "lr": 0.1}, t, ids, grad, "triton") for t in (table, one))
    assert_all_close(far, near, 2e-3)


def test_a_table_of_more_than_2_to_the_31_elements() -> None:
    count = 2**25 + 100
    table = torch.empty(count, 64, dtype=torch.float16, device=DEVICE)  # only the rows in use are ever touched
    ids = torch.tensor([0, count - 1, 2**25, count - 1], device=DEVICE)
    table[ids] = 1.0
    optimizer = RowOptimizer("sgd", lr=0.5)
    out = embedding_lookup(table.requires_grad_(), ids, optimizer=optimizer, backend="triton")
    assert out.eq(1.0).all()
    out.backward(torch.ones_like(out))
    after = table.detach()[ids]
    assert after[[0, 2]].eq(0.5).all()
    assert after[[1, 3]].eq(0.0).all()  # looked up twice


def test_the_same_inputs_give_the_same_bits() -> None:
    seed = generator(7)
    loss = {name: x.to(DEVICE) for name, x in loss_arguments(60, 20, 7, 24).items()}
    gate = {"x": normal(seed, 300, 24), "gate": normal(seed, 300, 24), "weight": torch.ones(24), "bias": torch.ones(24)}
    gate = {name: x.to(DEVICE) for name, x in gate.items()}
    ids, grad = torch.randint(7, (300,), generator=seed), normal(seed, 300, 24)

    def everything() -> dict[str, Tensor]:
        gated = forward_and_gradients(lambda **given: norm_gate(**given, backend="triton"), gate, 0)
        updated = trained({"name": "rowwise_adagrad", "lr": 0.1}, gate["x"].clone(), ids, grad, "triton")
        losses = run_loss(loss, "triton", Place(DEVICE, torch.float32))
        return {f"{i}{name}": x for i, part in enumerate((gated, updated, losses)) for name, x in part.items()}

    first, second = everything(), everything()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("width", [0, 10_000])
def test_widths_that_no_program_holds_are_refused_with_the_reason(width: int) -> None:
    wide, index = torch.zeros(2, width, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(BackendError, match=f"rows are {width} wide; 1 to 8192"):
        norm_gate(wide, wide, backend="triton")
    with pytest.raises(BackendError, match=f"rows are {width} wide; 1 to 1024"):
        embedding_lookup(wide, index, backend="triton")
    with pytest.raises(BackendError, match=f"vectors are {width} wide; 1 to 1024"):
        sampled_softmax_loss(wide, wide, index, index.unsqueeze(1), temperature=1.0, backend="triton")


@pytest.mark.parametrize("width", [1, 1024])
def test_the_narrowest_and_the_widest_rows(width: int) -> None:
    seed = generator(8)
    arguments = loss_arguments(5, 6, 9, width)
    expected = run_loss(arguments, "reference", Place("cpu", torch.float64))
    assert_all_close(run_loss(arguments, "triton", Place(DEVICE, torch.float32)), expected, TOLERANCE)
    table, ids, grad = normal(seed, 9, width), torch.tensor([8, 0, 8]), normal(seed, 3, width)
    optimizer = {"name": "rowwise_adam", "lr": 0.1, "eps": 1e-3, "max_norm": 1.0}
    actual = trained(optimizer, table.to(DEVICE, copy=True), ids, grad, "triton")
    assert_all_close(actual, trained(optimizer, table.double(), ids, grad, "reference"), TOLERANCE)
    leaves = {"x": normal(seed, 5, 8 * width), "gate": normal(seed, 5, 8 * width)}
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    gated = forward_and_gradients(
        lambda **given: norm_gate(**given, backend="triton"), {n: x.to(DEVICE) for n, x in leaves.items()}, 0
    )
    expected = forward_and_gradients(lambda **given: norm_gate(**given, backend="reference"), exact, 0)
    assert_all_close(gated, expected, TOLERANCE)


def test_updates_that_need_another_layout_are_refused_with_the_reason() -> None:
    ids = torch.tensor([0, 1], device=DEVICE)

    table = torch.zeros(3, 4, device=DEVICE).T.requires_grad_()
    out = embedding_lookup(table, ids, optimizer=RowOptimizer("rowwise_adagrad", lr=0.1), backend="triton")
    with pytest.raises(BackendError, match="an update needs rows with a stride of 1"):
        out.sum().backward()


# --- compilation


def test_every_kernel_compiles_for_gpus_within_their_shared_memory_and_without_atomics(tmp_path: Path) -> None:
    program = Path(__file__).parent / "triton_compile.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), "small"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    kernels = {(row["operator"], row["kernel"]) for row in rows}
    assert kernels == {
        ("norm_gate_calls", "forward_kernel"),
        ("norm_gate_calls", "backward_kernel"),
        ("sampled_softmax_calls", "forward_kernel"),
        ("sampled_softmax_calls", "backward_kernel"),
        ("sampled_softmax_calls", "add_kernel"),
        ("embedding_calls", "lookup_kernel"),
        ("embedding_calls", "rows_kernel"),
    }
    for kernel in kernels:
        of_kernel = [row for row in rows if (row["operator"], row["kernel"]) == kernel]
        assert {row["architecture"] for row in of_kernel} == {80, 90}
        assert {row["dtype"] for row in of_kernel} == {"torch.float32", "torch.bfloat16"}
    assert all(row["cubin"] > 0 for row in rows)
    assert max(row["shared"] for row in rows) <= 99 * 1024
    assert not any(row["atomics"] for row in rows)
