"""`hstu_attention` in Triton for Ascend under Triton's interpreter; test_ascend_lower.py has the compiling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from strategies import (
    AttentionCase,
    Place,
    assert_all_close,
    attention_cases,
    examples,
    forward_and_gradients,
    max_error,
    one_thread,  # noqa: F401
    opcheck,
)
from torch import Tensor

from npu_rec.ops import OPERATORS, hstu_attention, hstu_attention_triton_ascend
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.time_buckets import bucket_edges
from npu_rec.ops.triton_ascend_support import unusable

if unusable() is not None:
    pytest.skip(f"kernels for Ascend: {unusable()}", allow_module_level=True)

from npu_rec.kernels.ascend import attention
from npu_rec.kernels.ascend.attention import Tiles, tiles_of

CPU, HERE = Place("cpu", torch.float64), Place("cpu", torch.float32)
SMALL = {"forward": Tiles(16, 32), "query": Tiles(16, 16), "sorted": Tiles(16, 32), "key": Tiles(16, 16)}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles from few tokens."""
    monkeypatch.setattr(attention, "tiles_of", lambda kernel, width: SMALL[kernel])


def check(case: AttentionCase, tolerance: float = 2e-5) -> None:
    assert_all_close(case.run("triton_ascend", HERE), case.run("reference", CPU), tolerance)


@pytest.mark.usefixtures("small_tiles")
def test_forward_and_gradients_equal_the_reference() -> None:
    @examples(12)
    @given(attention_cases(largest=50))
    def run(case: AttentionCase) -> None:
        check(case)

    run()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize(("contextual", "window", "full"), [(0, 0, 0), (0, 9, 30), (3, 0, 0), (35, 9, 4)])
def test_every_mask_equals_the_reference(causal: bool, targets: bool, contextual: int, window: int, full: int) -> None:
    check(
        AttentionCase(
            lengths=(49, 33),
            num_targets=(30, 3) if targets else None,
            max_seq_len=60,
            heads=1,
            causal=causal,
            contextual_seq_len=contextual,
            max_attn_len=window,
            min_full_attn_seq_len=full,
            bias="time",
            times="tied",
        )
    )


@pytest.mark.parametrize("times", ["sorted", "unsorted"])
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(1, 1), (25, 50), (64, 100), (130, 7), (256, 256)])
def test_every_width_with_its_own_tiles_equals_the_reference(qk_dim: int, v_dim: int, times: str) -> None:
    case = AttentionCase((37, 150), max_seq_len=155, heads=1, qk_dim=qk_dim, v_dim=v_dim, bias="time", times=times)
    check(dataclasses.replace(case, alpha=qk_dim**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_pytorch_in_the_same_precision(dtype: torch.dtype) -> None:
    case = AttentionCase((130, 40), max_seq_len=140, heads=1, qk_dim=32, v_dim=32, alpha=32**-0.5, bias="time")
    place = Place("cpu", dtype)
    leaves = {name: leaf.to("cpu", dtype).double() for name, leaf in case.leaves().items()}
    exact = forward_and_gradients(case.call("reference"), leaves, case.seed)
    ours = max_error(case.run("triton_ascend", place), exact)
    theirs = max_error(case.run("reference", place), exact)  # float32 inside, rounded at the end: the best there is
    one_unit = {name: float(value.abs().max()) * torch.finfo(dtype).eps for name, value in exact.items()}
    assert all(ours[name] <= 2 * theirs[name] + 4 * one_unit[name] for name in exact), (ours, theirs)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("contextual", [0, 4])
def test_the_same_call_gives_the_same_bits(contextual: int) -> None:
    case = AttentionCase((40, 0, 1, 70), (3, 0, 1, 36), max_seq_len=71, contextual_seq_len=contextual, bias="time")
    first, second = (case.run("triton_ascend", HERE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens_give_empty_outputs_and_zero_gradients(lengths: tuple[int, ...]) -> None:
    case = AttentionCase(lengths, tuple(0 for _ in lengths), bias="time")
    results = case.run("triton_ascend", HERE)
    assert results["out"].shape == (0, case.heads, case.v_dim)
    assert not results["position_weight"].any()
    assert not results["time_weight"].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("unsorted_at", "sums"), [(None, "by reach"), (7, "by bucket")])
def test_sorted_times_take_the_cheap_gradient(
    unsorted_at: int | None, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair out of order anywhere is enough for the general form; borders between sequences are no disorder."""
    times = torch.cat([torch.arange(20), torch.arange(15)]) * 1000
    if unsorted_at is not None:
        times[unsorted_at] += 1001
    found = []
    reach_of = attention.reach_of
    monkeypatch.setattr(attention, "reach_of", lambda call: found.append(reach_of(call)) or found[-1])
    case = AttentionCase((20, 15), max_seq_len=21, bias="time")
    monkeypatch.setattr(AttentionCase, "query_and_key_times", lambda self: (times, times))
    check(case)
    assert [reach is not None for reach in found] == [sums == "by reach"]


def test_time_buckets_in_float32_are_exact_for_months() -> None:
    """What `bucket_of` computes, for every interval up to 2^24 s: where it first differs from the table of edges."""
    seconds = torch.arange(1, 2**24)
    buckets = (seconds.float().log() / torch.tensor(0.301)).to(torch.int64)
    edges = torch.tensor(bucket_edges(128)[1:-1])
    differs = (buckets != torch.bucketize(seconds, edges, right=True)).nonzero().flatten() + 1
    assert differs.numel() == 0 or int(differs[0]) > 10_000_000
    for second in differs.tolist():
        assert float((edges - second).abs().min()) <= second * torch.finfo(torch.float32).eps * 16


def test_tiles_keep_the_rules_of_the_kernels() -> None:
    for width in (16, 32, 64, 128, 256):
        for kernel in ("forward", "query", "sorted", "key"):
            assert min(tiles_of(kernel, width).queries, tiles_of(kernel, width).keys) >= 16
        for kernel in ("query", "sorted"):
            assert tiles_of(kernel, width).queries <= tiles_of(kernel, width).keys


def test_opcheck_of_the_operator_and_its_backward() -> None:
    case = AttentionCase((4, 0, 1), max_seq_len=5, heads=2, qk_dim=2, v_dim=3)
    leaves = case.leaves(torch.float32)
    offsets = lengths_to_offsets(torch.tensor(case.lengths))
    rest = (offsets, None, None, None, None, None, 5, 1.0, 5.0, True, 0, 0, 0, "triton_ascend")
    opcheck("hstu_attention", "triton_ascend", (*(x.clone().requires_grad_() for x in leaves.values()), *rest))
    opcheck("hstu_attention_backward", "triton_ascend", (torch.ones(5, 2, 3), *leaves.values(), *rest))


@pytest.mark.usefixtures("small_tiles")
def test_offsets_and_targets_may_be_columns_of_a_table() -> None:
    table = torch.tensor([[0, 3], [25, 5], [40, 0]])
    x = torch.randn(40, 1, 4, generator=torch.Generator().manual_seed(0))

    def run(backend: str) -> Tensor:
        return hstu_attention(x, x, x, table[:, 0], max_seq_len=30, num_targets=table[:2, 1], backend=backend)

    torch.testing.assert_close(run("triton_ascend"), run("reference"), rtol=1e-4, atol=1e-6)


def test_what_it_cannot_run_has_a_reason() -> None:
    supports = hstu_attention_triton_ascend.supports
    request = OPERATORS["hstu_attention"].sample(torch.device("cpu"))
    assert supports(request) is None
    assert "float64" in str(supports(dataclasses.replace(request, q=request.q.double())))
    wide = torch.zeros(8, 1, 257)
    assert "257 wide" in str(supports(dataclasses.replace(request, q=wide, k=wide)))
    assert "140 buckets" in str(supports(dataclasses.replace(request, time_weight=torch.zeros(141))))
    assert "2^31" in str(supports(dataclasses.replace(request, max_seq_len=2**28)))
