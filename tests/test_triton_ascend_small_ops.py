"""`norm_gate`, `sampled_softmax_loss` and `embedding_lookup` in Triton for Ascend: what other tests leave out.

They run on an NPU, or anywhere under the interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Place,
    assert_all_close,
    examples,
    forward_and_gradients,
    generator,
    normal,
    one_thread,  # noqa: F401
)
from test_ops_embedding import Equations, gradients, results_of, update
from test_ops_loss import LossCase
from test_ops_norm_gate import GateCase, keys_of
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import (
    OPERATORS,
    RowOptimizer,
    embedding_lookup,
    norm_gate,
    sampled_softmax_loss,
    triton_ascend_support,
)
from npu_rec.ops.random import dropout_scale, random_bits
from npu_rec.ops.row_optimizer import RowOptimizerName
from npu_rec.ops.triton_support import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
_accelerator = torch.accelerator.current_accelerator(check_available=True)
if not INTERPRETED and (_accelerator is None or _accelerator.type != "npu"):
    pytest.skip("no NPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from npu_rec.kernels.ascend import sampled_softmax, segment_sum  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "npu"
PLACE, EXACT = Place(DEVICE, torch.float32), Place("cpu", torch.float64)
BACKEND = "triton_ascend"
each_rule = pytest.mark.parametrize("rule", get_args(RowOptimizerName))


def programs_are(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter only: an NPU has the programs it has."""
    if not INTERPRETED:
        pytest.skip("the number of programs is that of the NPU")
    monkeypatch.setattr(triton_ascend_support, "INTERPRETED_PROGRAMS", count)


# --- norm_gate


@pytest.mark.parametrize("probability", [1e-9, 0.001, 0.2, 0.5, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("width", [1, 131])
def test_dropout_is_that_of_the_reference_bit_for_bit(probability: float, width: int) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (150,), generator=generator(0))
    keys = torch.cat([keys, torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**32, 2**31, -(2**31)])])
    ones = torch.ones(keys.shape[0], width, device=DEVICE)  # a row of ones is normalised to zeros
    gate = ones.clone().requires_grad_()
    out = norm_gate(ones, gate, bias=ones[0], dropout=probability, dropout_keys=keys.to(DEVICE), backend=BACKEND)
    expected = dropout_scale(keys, width, probability)
    assert torch.equal(out.detach().cpu(), expected)
    assert torch.equal(torch.autograd.grad(out.sum(), gate)[0].cpu(), expected)


@pytest.mark.parametrize("above", [0, 1])
def test_a_draw_that_equals_the_threshold_is_kept(above: int) -> None:
    keys, ones = keys_of(5), torch.ones(5, 40, device=DEVICE)
    draw = int(random_bits(keys, 40)[3, 7]) & 0x7FFFFFFF
    how = {"dropout": (draw + above) / 2**31, "dropout_keys": keys.to(DEVICE)}
    out = norm_gate(ones, ones, bias=ones[0], **how, backend=BACKEND).cpu()
    assert bool(out[3, 7] > 0) == (above == 0)
    assert torch.equal(out, dropout_scale(keys, 40, how["dropout"]))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
    "every third row": lambda x: x.repeat_interleave(3, 0)[::3],
    "one gate for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_gate_takes_rows_of_any_stride(layout: str) -> None:
    seed, of = generator(0), LAYOUTS[layout]
    x, gate, grad = (normal(seed, 37, 21) for _ in range(3))

    def run(backend: str, place: Place) -> dict[str, Tensor]:
        moved = [t.to(place.device, place.dtype) for t in (x, gate, grad)]
        x_leaf = (moved[0] if layout == "one gate for all" else of(moved[0])).detach().requires_grad_()
        gate_leaf = of(moved[1]).detach().requires_grad_()
        out = norm_gate(x_leaf, gate_leaf, dropout=0.2, dropout_keys=keys_of(37).to(place.device), backend=backend)
        d_x, d_gate = torch.autograd.grad(out, [x_leaf, gate_leaf], of(moved[2]))
        return {name: t.detach().cpu().double() for name, t in (("out", out), ("x", d_x), ("gate", d_gate))}

    assert_all_close(run(BACKEND, PLACE), run("reference", EXACT), PLACE.tolerance)


@pytest.mark.parametrize(("tokens", "width"), [(128 * 7 + 5, 9), (21, 1025), (5, 2048), (1, 3)])
def test_blocks_of_rows_beyond_the_programs_and_rows_of_the_greatest_width(tokens: int, width: int) -> None:
    case = GateCase(tokens=tokens, width=width, weight=True, bias=True, dropout=0.3, keys=True)
    assert_all_close(case.run(BACKEND, PLACE), case.expected(), PLACE.tolerance)


# --- sampled_softmax_loss


@pytest.mark.parametrize("negatives", [0, 1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("everything", [False, True])
def test_any_number_of_negatives_fills_tiles_and_leaves_a_rest(negatives: int, everything: bool) -> None:
    case = LossCase(negatives=negatives, rows=4, log_q=everything, mask_collisions=everything)
    expected = case.run("reference", EXACT)
    assert_all_close(case.run(BACKEND, PLACE), expected, PLACE.tolerance, floor=1 / case.temperature)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 1024])
def test_vectors_of_any_width_are_padded(width: int) -> None:
    case = LossCase(width=width, log_q=True)
    expected = case.run("reference", EXACT)
    assert_all_close(case.run(BACKEND, PLACE), expected, PLACE.tolerance, floor=1 / case.temperature)


def test_a_row_whose_index_stands_behind_the_last_negative_has_no_influence() -> None:
    """A tile has room for four negatives, and times zero NaN is NaN."""
    queries, rows, positives = normal(generator(0), 1, 6), normal(generator(1), 5, 6), torch.tensor([1])
    rows[4] = torch.nan
    negatives = torch.tensor([[0, 2, 3, 4]])[:, :3].to(DEVICE)

    def run(backend: str, place: Place) -> dict[str, Tensor]:
        leaves = {"queries": queries.to(place.device, place.dtype), "rows": rows.to(place.device, place.dtype)}
        index = {"positives": positives.to(place.device), "negatives": negatives.to(place.device)}
        return forward_and_gradients(
            lambda **leaves: sampled_softmax_loss(**leaves, **index, temperature=1.0, backend=backend), leaves, 0
        )

    assert_all_close(run(BACKEND, PLACE), run("reference", EXACT), PLACE.tolerance)


@pytest.mark.parametrize("entries", [1, 30, 64])
def test_chunks_of_any_size_give_the_same_loss(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_softmax, "ENTRIES_AT_ONCE", entries)
    case = LossCase(tokens=13, negatives=9, rows=5, log_q=True)
    expected = case.run("reference", EXACT)
    assert_all_close(case.run(BACKEND, PLACE), expected, PLACE.tolerance, floor=1 / case.temperature)


@examples(30)
@given(
    tokens=st.integers(1, 30),
    fan=st.integers(1, 4),
    rows=st.sampled_from([1, 2, 3]) | st.integers(1, 60),
    width=st.integers(1, 40),
    programs=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_segments_are_summed_whole_and_added_to_what_is_there(
    tokens: int, fan: int, rows: int, width: int, programs: int, seed: int
) -> None:
    random = generator(seed)
    source, weights, before = normal(random, tokens, width), normal(random, tokens * fan), normal(random, rows, width)
    index = torch.randint(rows, (tokens * fan,), generator=random)
    out = before.to(DEVICE, copy=True)
    moved = (x.to(DEVICE) for x in (index, weights))
    segment_sum.add_segments(out, segment_sum.padded(source.to(DEVICE)), *moved, programs)
    products = weights.double()[:, None] * source.double().repeat_interleave(fan, 0)
    expected = before.double().index_add(0, index, products)
    assert_all_close({"out": out.cpu().double()}, {"out": expected}, PLACE.tolerance)


# --- embedding_lookup


@each_rule
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_updates_of_few_rows_by_many_lookups_and_of_many_by_few(rule: RowOptimizerName, max_norm: float | None) -> None:
    table = normal(generator(0), 50, 17).to(DEVICE).requires_grad_()
    expected, optimizer = Equations(rule, table.detach(), max_norm=max_norm), RowOptimizer(rule, 0.1, max_norm=max_norm)
    many = torch.randint(3, (120,), generator=generator(1))  # whole tiles and a rest
    for step, ids in enumerate((many, torch.arange(49, -1, -1), torch.cat([many, torch.tensor([49])]))):
        grad = gradients(step, ids.shape[0], 17)
        update(table, ids, grad, optimizer, BACKEND)
        expected.step(ids, grad, 0.1)
    assert_all_close(results_of(table, optimizer), expected.results(), PLACE.tolerance)


@each_rule
def test_an_update_in_a_slice_of_columns_leaves_everything_else_alone(rule: RowOptimizerName) -> None:
    whole, ids = normal(generator(3), 30, 48).to(DEVICE), torch.randint(9, (40,), generator=generator(4))
    before, grad = whole.clone(), gradients(5, 40, 20)
    table, optimizer = whole[:, 5:25].requires_grad_(), RowOptimizer(rule, 0.1)
    expected = Equations(rule, before[:, 5:25])
    update(table, ids, grad, optimizer, BACKEND)
    expected.step(ids, grad, 0.1)
    assert_all_close(results_of(table, optimizer), expected.results(), PLACE.tolerance)
    changed = (whole.detach() != before).nonzero()
    assert set(changed[:, 0].tolist()) == set(ids.tolist())
    assert set(changed[:, 1].tolist()) == set(range(5, 25))


@each_rule
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_leaves_its_row_and_its_state_alone(rule: RowOptimizerName, bad: float) -> None:
    table, optimizer = torch.ones(4, 5, device=DEVICE, requires_grad=True), RowOptimizer(rule, 0.1, max_norm=1.0)
    grad = torch.ones(3, 5)
    grad[1, 2] = bad
    update(table, torch.tensor([0, 2, 3]), grad, optimizer, BACKEND)
    changed = {name: (x != before).view(4, -1).any(1) for name, x, before in _states(table, optimizer)}
    assert all(rows.tolist() == [True, False, False, True] for rows in changed.values())


def _states(table: Tensor, optimizer: RowOptimizer) -> list[tuple[str, Tensor, float]]:
    """(name, tensor, what it was filled with)."""
    parts = (("table", table.detach(), 1.0), ("square", optimizer.square, 0.0), ("momentum", optimizer.momentum, 0.0))
    return [(name, x, before) for name, x, before in parts if x is not None]


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("width", [1, 50, 1024])
def test_rows_are_copied_exactly(tokens: int, width: int) -> None:
    table = normal(generator(0), 6, width + 3).to(DEVICE)[:, 1:-2]
    ids = torch.randint(6, (tokens,), generator=generator(tokens)).to(DEVICE)
    assert torch.equal(embedding_lookup(table, ids, backend=BACKEND), table[ids])
    every_other = torch.stack([ids, ids], 1).flatten()[::2]
    assert torch.equal(embedding_lookup(table.T.contiguous().T, every_other, backend=BACKEND), table[ids])


# --- all three


def test_the_same_inputs_give_the_same_bits_however_many_programs_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = GateCase(tokens=150, width=24, weight=True, bias=True, dropout=0.2, keys=True)
    loss = LossCase(tokens=13, negatives=20, rows=7, log_q=True)
    ids, grad = torch.randint(7, (100,), generator=generator(0)), normal(generator(1), 100, 24)

    def everything() -> dict[str, Tensor]:
        table, optimizer = normal(generator(2), 7, 24).to(DEVICE).requires_grad_(), RowOptimizer("rowwise_adam", 0.1)
        update(table, ids, grad, optimizer, BACKEND)
        parts = (gate.run(BACKEND, PLACE), loss.run(BACKEND, PLACE), results_of(table, optimizer))
        return {f"{i}{name}": x for i, part in enumerate(parts) for name, x in part.items()}

    first, second = everything(), everything()
    assert all(torch.equal(first[name], second[name]) for name in first)
    partial_sums = {"0weight", "0bias"}  # one a program
    for count in (1, 5):
        programs_are(count, monkeypatch)
        other = everything()
        assert all(torch.equal(first[name], other[name]) for name in first.keys() - partial_sums)
        assert_all_close(other, first, PLACE.tolerance)


def far_rows(values: Tensor) -> Tensor:
    """float16 `[3, C]` with 2^30 elements between the rows, of which only these are ever touched."""
    stride = 2**30
    storage = torch.empty(2 * stride + values.shape[1], dtype=torch.float16, device=DEVICE)
    return storage.as_strided(values.shape, (stride, 1)).copy_(values)


@pytest.mark.parametrize("operator", ["norm_gate", "sampled_softmax_loss"])
def test_rows_beyond_2_to_the_31_elements_are_found(operator: str) -> None:
    one, other = (normal(generator(seed), 3, 32).half().to(DEVICE) for seed in (6, 7))
    positives, negatives = torch.tensor([0, 2, 1], device=DEVICE), torch.tensor([[2], [0], [2]], device=DEVICE)

    def run(x: Tensor, y: Tensor) -> Tensor:
        if operator == "norm_gate":
            return norm_gate(x, y, backend=BACKEND)
        return sampled_softmax_loss(x, y, positives, negatives, temperature=1.0, backend=BACKEND)

    near, far = ({"x": of(one), "y": of(other)} for of in (torch.clone, far_rows))
    assert_all_close(forward_and_gradients(run, far, 0), forward_and_gradients(run, near, 0), 0.0)


def test_rows_of_a_table_beyond_2_to_the_31_elements_are_found_and_updated() -> None:
    values, ids, grad = normal(generator(6), 3, 40).half().to(DEVICE), torch.tensor([2, 0, 2]), gradients(7, 3, 40)
    near, far = values.clone().requires_grad_(), far_rows(values).requires_grad_()
    assert torch.equal(embedding_lookup(far, ids.to(DEVICE), backend=BACKEND), values[ids.to(DEVICE)])
    optimizers = [RowOptimizer("rowwise_adam", 0.1) for _ in range(2)]
    for table, optimizer in zip((near, far), optimizers, strict=True):
        update(table, ids, grad, optimizer, BACKEND)
    assert_all_close(results_of(far, optimizers[1]), results_of(near, optimizers[0]), 0.0)
    assert not torch.equal(far.detach()[[0, 2]], values[[0, 2]])


# --- what is refused


@pytest.mark.parametrize("width", [0, 4096])
def test_widths_that_no_vector_core_holds_are_refused_with_the_reason(width: int) -> None:
    wide, index = torch.zeros(2, width, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(BackendError, match=f"rows are {width} wide; 1 to 2048"):
        norm_gate(wide, wide, backend=BACKEND)
    with pytest.raises(BackendError, match=f"rows are {width} wide; 1 to 1024"):
        embedding_lookup(wide, index, backend=BACKEND)
    with pytest.raises(BackendError, match=f"vectors are {width} wide; 1 to 1024"):
        sampled_softmax_loss(wide, wide, index, index.unsqueeze(1), temperature=1.0, backend=BACKEND)


def test_dtypes_and_layouts_that_the_kernels_do_not_take_are_refused_with_the_reason() -> None:
    double, index = torch.zeros(3, 4, dtype=torch.float64, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    with pytest.raises(BackendError, match=r"the dtype is torch\.float64"):
        norm_gate(double, double, backend=BACKEND)
    with pytest.raises(BackendError, match=r"the dtype is torch\.float64"):
        embedding_lookup(double, index, backend=BACKEND)
    with pytest.raises(BackendError, match=r"the dtype is torch\.float64"):
        sampled_softmax_loss(double, double, index, index.unsqueeze(1), temperature=1.0, backend=BACKEND)
    table = torch.zeros(4, 3, device=DEVICE).T.requires_grad_()
    out = embedding_lookup(table, index, optimizer=RowOptimizer("rowwise_adagrad", 0.1), backend=BACKEND)
    with pytest.raises(BackendError, match="an update needs rows with a stride of 1"):
        out.sum().backward()


@pytest.mark.parametrize("operator", ["norm_gate", "sampled_softmax_loss", "embedding_lookup"])
def test_without_an_npu_the_backends_say_so_and_stand_behind_those_of_the_vendor(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = OPERATORS[operator]
    names = [backend.name for backend in registered.backends]
    assert names[names.index(BACKEND) - 1] == ("vendor" if "vendor" in names else "triton")
    assert registered.find(BACKEND).by_name_only == INTERPRETED
    monkeypatch.setattr(triton_ascend_support, "INTERPRETED", False)
    assert registered.availability(torch.device("cpu"))[BACKEND] == "the tensors are on cpu"
