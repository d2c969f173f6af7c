"""`hstu_attention` in Triton: on a GPU where there is one, under Triton's interpreter otherwise."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

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

from npu_rec.ops import OPERATORS, RelativeBias, hstu_attention, hstu_attention_triton
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.triton_support import INTERPRETED, unusable

DEVICE = "cpu" if INTERPRETED else "cuda"
if unusable() is not None:
    pytest.skip(f"triton kernels: {unusable()}", allow_module_level=True)

from npu_rec.kernels.triton import attention  # noqa: E402
from npu_rec.kernels.triton.attention import Tiles, tiles_of  # noqa: E402
from npu_rec.kernels.triton.schedule import work_items  # noqa: E402

CPU, HERE = Place("cpu", torch.float64), Place(DEVICE, torch.float32)
SMALL_TILES = {"forward": Tiles(32, 16, 4, 1), "query": Tiles(16, 16, 4, 1), "key": Tiles(16, 32, 4, 1)}
EVERYTHING = AttentionCase(
    lengths=(40, 0, 1, 70),
    num_targets=(3, 0, 1, 36),
    max_seq_len=71,
    heads=1,
    contextual_seq_len=4,
    max_attn_len=20,
    min_full_attn_seq_len=5,
    bias="time",
    times="unsorted",
)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles from few tokens."""
    monkeypatch.setattr(attention, "tiles_of", lambda kernel, width, item_bytes: SMALL_TILES[kernel])


def check(case: AttentionCase, tolerance: float = 2e-5) -> None:
    assert_all_close(case.run("triton", HERE), case.run("reference", CPU), tolerance)


@pytest.mark.usefixtures("small_tiles")
def test_forward_and_gradients_equal_the_reference() -> None:
    @examples(20 if INTERPRETED else 120)
    @given(attention_cases(largest=50))
    def run(case: AttentionCase) -> None:
        check(case)

    run()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize(("contextual", "window", "full"), [(0, 0, 0), (0, 9, 0), (0, 9, 30), (3, 0, 0), (35, 9, 4)])
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


@pytest.mark.parametrize("bias", ["none", "position", "time"])
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(1, 1), (25, 50), (64, 100), (130, 7), (256, 256)])
def test_every_width_with_its_own_tiles_equals_the_reference(qk_dim: int, v_dim: int, bias: str) -> None:
    case = AttentionCase((37, 70), max_seq_len=75, heads=1, qk_dim=qk_dim, v_dim=v_dim, bias=bias, alpha=qk_dim**-0.5)
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_pytorch_in_the_same_precision(dtype: torch.dtype) -> None:
    case = AttentionCase((130, 40), max_seq_len=140, heads=1, qk_dim=32, v_dim=32, alpha=32**-0.5, bias="time")
    place = Place(DEVICE, dtype)
    leaves = {name: leaf.to("cpu", dtype).double() for name, leaf in case.leaves().items()}
    exact = forward_and_gradients(case.call("reference"), leaves, case.seed)
    ours = max_error(case.run("triton", place), exact)
    theirs = max_error(case.run("reference", place), exact)  # float32 inside, rounded at the end: the best there is
    one_unit = {name: float(value.abs().max()) * torch.finfo(dtype).eps for name, value in exact.items()}
    assert all(ours[name] <= 2 * theirs[name] + 4 * one_unit[name] for name in exact), (ours, theirs)


@pytest.mark.usefixtures("small_tiles")
def test_the_same_call_gives_the_same_bits() -> None:
    first, second = (EVERYTHING.run("triton", HERE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("programs", [1, 3])
def test_rows_may_be_taken_a_few_programs_at_a_time(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PARTIAL_ENTRIES", programs * (2 * EVERYTHING.max_seq_len - 1))
    check(EVERYTHING)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["k", "v"])
def test_numbers_that_are_not_finite_stay_inside_the_gradients(
    bad: float, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = AttentionCase((40,), max_seq_len=40, heads=1, bias="time")
    leaves = case.leaves(torch.float32, DEVICE)
    leaves[place][0] = bad
    around: list[Tensor] = []
    zeros = torch.zeros

    def fenced(*shape: int, **options: object) -> Tensor:
        if len(shape) != 2:
            return zeros(*shape, **options)  # type: ignore[call-overload, no-any-return]
        whole = zeros(shape[0] * shape[1] + 400, **options)  # type: ignore[call-overload]
        around.append(whole)
        return whole[200:-200].view(shape)  # type: ignore[no-any-return]

    out = case.call("triton", DEVICE)(**{name: leaf.requires_grad_() for name, leaf in leaves.items()})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", fenced)
        out.sum().backward()
    assert len(around) == 2  # partial gradients of the two tables
    for whole in around:
        assert not whole[:200].any()
        assert not whole[-200:].any()
    gradient = leaves["position_weight"].grad
    assert gradient is not None
    assert not gradient[40:].any()  # no key lies ahead of its query


@pytest.mark.usefixtures("small_tiles")
def test_offsets_and_targets_may_be_columns_of_a_table() -> None:
    table = torch.tensor([[0, 3], [25, 5], [40, 0]], device=DEVICE)
    x = torch.randn(40, 1, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets, targets = table[:, 0], table[:2, 1]

    def run(backend: str) -> Tensor:
        return hstu_attention(x, x, x, offsets, max_seq_len=30, num_targets=targets, backend=backend)

    torch.testing.assert_close(run("triton"), run("reference"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens_give_empty_outputs_and_zero_gradients(lengths: tuple[int, ...]) -> None:
    case = AttentionCase(lengths, tuple(0 for _ in lengths), bias="time")
    results = case.run("triton", HERE)
    assert results["out"].shape == (0, case.heads, case.v_dim)
    assert not results["position_weight"].any()
    assert not results["time_weight"].any()


@pytest.mark.usefixtures("small_tiles")
def test_views_of_a_wider_tensor_are_read_where_they_lie() -> None:
    total, heads, width = 40, 2, 5
    offsets = lengths_to_offsets(torch.tensor([25, 15])).to(DEVICE)
    wide = torch.randn(total, 3 * heads * width + 1, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bias = RelativeBias(torch.randn(59, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = wide.to(dtype, copy=True).requires_grad_()
        q, k, v = (leaf[:, i * heads * width : (i + 1) * heads * width].unflatten(1, (heads, width)) for i in range(3))
        out = hstu_attention(q, k, v, offsets, max_seq_len=30, bias=bias, backend=backend)
        out.transpose(0, 1).square().sum().backward()  # a gradient whose strides are not the output's
        assert leaf.grad is not None
        results.append({"out": out.detach().cpu().double(), "grad": leaf.grad.cpu().double()})
    assert_all_close(*results, 2e-5)


def test_tokens_more_than_two_to_the_31_elements_apart() -> None:
    stride = 2**31 + 16
    held = torch.empty(stride + 64, dtype=torch.bfloat16, device=DEVICE)  # pages that nobody touches cost nothing
    q = held.as_strided((2, 1, 16), (stride, 16, 1))
    q.copy_(torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)))
    near = q.clone()
    offsets = torch.tensor([0, 2], device=DEVICE)
    far_out = hstu_attention(q, q, q, offsets, max_seq_len=2, backend="triton")
    assert torch.equal(far_out, hstu_attention(near, near, near, offsets, max_seq_len=2, backend="triton"))
    assert far_out.abs().min() > 0


def test_times_far_apart_are_clamped_and_others_exact() -> None:
    times = torch.tensor([0, 10, 2**31 - 20, 2**31 - 10], dtype=torch.int64, device=DEVICE)
    weight = torch.arange(129.0, device=DEVICE)
    one = torch.ones(4, 1, 1, device=DEVICE)
    offsets = torch.tensor([0, 4], device=DEVICE)

    def run(backend: str, times: Tensor) -> Tensor:
        bias = RelativeBias(torch.zeros(7, device=DEVICE), weight, times, times)
        return hstu_attention(one, one, one, offsets, max_seq_len=4, bias=bias, backend=backend)

    torch.testing.assert_close(run("triton", times), run("reference", times), rtol=1e-6, atol=0)
    assert run("triton", times * 2**20).isfinite().all()


@pytest.mark.parametrize("lengths", [(0,), (5,), (64,), (65, 0, 3, 128), (1, 1, 1)])
@pytest.mark.parametrize("last_first", [True, False])
def test_work_covers_every_block_once_longest_sequence_first(lengths: tuple[int, ...], last_first: bool) -> None:
    offsets = lengths_to_offsets(torch.tensor(lengths))
    work = work_items(offsets, sum(lengths), 64, last_first=last_first)
    done = [(b, i) for b, i in work.tolist() if i >= 0]
    assert sorted(done) == [(b, i) for b, n in enumerate(lengths) for i in range(-(-n // 64))]
    blocks = [-(-lengths[b] // 64) for b, _ in done]
    assert blocks == sorted(blocks, reverse=True)
    longest = [i for b, i in done if b == done[0][0]] if done else []
    assert longest == sorted(longest, reverse=last_first)


def test_tiles_keep_the_rules_of_the_kernels() -> None:
    for width in (16, 32, 64, 128, 256):
        for item_bytes in (2, 4):
            forward, query = tiles_of("forward", width, item_bytes), tiles_of("query", width, item_bytes)
            assert forward.queries % forward.keys == 0
            assert query.queries == query.keys
            assert tiles_of("key", width, item_bytes).queries >= 16


def test_opcheck_of_the_operator_and_its_backward() -> None:
    case = AttentionCase((4, 0, 1), max_seq_len=5, heads=2, qk_dim=2, v_dim=3)
    leaves = case.leaves(torch.float32, DEVICE)
    offsets = lengths_to_offsets(torch.tensor(case.lengths)).to(DEVICE)
    rest = (offsets, None, None, None, None, None, 5, 1.0, 5.0, True, 0, 0, 0, "triton")
    opcheck("hstu_attention", "triton", (*(x.clone().requires_grad_() for x in leaves.values()), *rest))
    opcheck("hstu_attention_backward", "triton", (torch.ones(5, 2, 3, device=DEVICE), *leaves.values(), *rest))


def test_what_it_cannot_run_has_a_reason() -> None:
    request = OPERATORS["hstu_attention"].sample(torch.device(DEVICE))
    assert hstu_attention_triton.supports(request) is None
    assert "float64" in str(hstu_attention_triton.supports(dataclasses.replace(request, q=request.q.double())))
    wide = torch.zeros(8, 1, 257, device=DEVICE)
    assert "257 wide" in str(hstu_attention_triton.supports(dataclasses.replace(request, q=wide, k=wide)))


def test_every_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    program = Path(__file__).parent / "triton_compile.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), "attention"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["kernel"], row["architecture"]) for row in rows} == {
        (kernel, architecture)
        for kernel in ("forward_kernel", "query_kernel", "key_kernel")
        for architecture in (80, 90)
    }
    assert all(row["cubin"] > 0 for row in rows)
    assert max(row["shared"] for row in rows) <= 99 * 1024  # what every GPU since Ampere lets a program have
    assert {row["kernel"] for row in rows if row["atomics"]} == {"query_kernel"}  # a program's own position gradient
