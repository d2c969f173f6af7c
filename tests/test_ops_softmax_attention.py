"""`softmax_attention`: the reference against loops written from the definition, the backends against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import vendor_standins_npu as vendor
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    AttentionCase,
    LargestTensor,
    Place,
    assert_all_close,
    attention_cases,
    backends,
    examples,
    forward_and_gradients,
    max_error,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
    unsupported_rejected,
)
from torch import Tensor
from vendor_standins import registered

from npu_rec.ops import OPERATORS, attention_tiles, softmax_attention, softmax_attention_flash, softmax_attention_tiled
from npu_rec.ops.compiled import unusable
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.masks import MaskRule
from npu_rec.ops.random import derive_keys, dropout_scale
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest
from npu_rec.ops.time_buckets import time_bucket_reference

BACKEND = OPERATORS["softmax_attention"].find("vendor")


def ids_of(case: AttentionCase, n: int, t: int) -> tuple[list[int], int]:
    c = case.contextual_seq_len
    limit = n - t if c == 0 else n - c + 1 - t
    ids = [p if c == 0 else max(p - c + 1, 0) for p in range(n)]
    return ([min(i, limit) for i in ids] if case.num_targets is not None else ids), limit


def sees(case: AttentionCase, i: int, j: int, ids: list[int], limit: int) -> bool:
    w, f = case.max_attn_len, case.min_full_attn_seq_len
    yes = i == j or (ids[i] > ids[j] if case.causal else ids[i] != ids[j])
    if w > 0:
        yes = yes and (ids[i] - ids[j] <= w or (f > 0 and ids[i] >= limit - f))
    return yes or (case.contextual_seq_len > 0 and ids[i] == 0 and ids[j] < limit)


def definition(case: AttentionCase, dropout: float = 0.0) -> Callable[..., Tensor]:
    """Row by row: the keys a query sees, the softmax over them, each weight dropped by its own draw."""
    query_time, key_time = case.query_and_key_times()
    keys, targets = case.dropout_keys(), case.num_targets or (0,) * len(case.lengths)

    def run(
        q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor | None = None, time_weight: Tensor | None = None
    ) -> Tensor:
        rows, start = [], 0
        for n, t in zip(case.lengths, targets, strict=True):
            ids, limit = ids_of(case, n, t)
            for i in range(n):
                seen = [j for j in range(n) if sees(case, i, j, ids, limit)]
                at = torch.tensor(seen) + start
                scores = (q[start + i] * k[at]).sum(2) * case.alpha  # [keys, H]
                if position_weight is not None:
                    places = torch.tensor([case.max_seq_len - 1 + ids[j] - ids[i] for j in seen])
                    scores = scores + position_weight[places].unsqueeze(1)
                if time_weight is not None:
                    bucket = time_bucket_reference(query_time[start + i] - key_time[at], case.buckets)
                    scores = scores + time_weight[bucket].unsqueeze(1)
                weights = scores.exp() / scores.exp().sum(0)
                if dropout > 0.0:
                    draws = [dropout_scale(derive_keys(keys[start + i], h), n, dropout) for h in range(case.heads)]
                    weights = weights * torch.stack(draws, 1)[torch.tensor(seen)].to(weights)
                rows.append(torch.einsum("jh,jhd->hd", weights, v[at]))
            start += n
        return torch.stack(rows) if rows else v * 1.0

    return run


# --- the reference


@examples(60)
@given(attention_cases(largest=14, widest=6), st.sampled_from([0.0, 0.3]))
def test_the_reference_is_the_definition(case: AttentionCase, dropout: float) -> None:
    leaves = case.leaves()
    expected = forward_and_gradients(
        lambda **x: definition(case, dropout)(**x) + 0.0 * sum(leaf.sum() for leaf in x.values()), leaves, case.seed
    )
    assert_all_close(forward_and_gradients(case.softmax("reference", dropout), leaves, case.seed), expected, 1e-11)


SMALL = AttentionCase(lengths=(4, 0, 1), max_seq_len=5, heads=2, qk_dim=2, v_dim=3, buckets=12, bias="time")
EVERYTHING = AttentionCase(
    lengths=(70, 0, 1, 130),
    num_targets=(3, 0, 1, 66),
    max_seq_len=131,
    contextual_seq_len=2,
    max_attn_len=40,
    min_full_attn_seq_len=5,
    bias="time",
    times="unsorted",
)
ALL = backends("softmax_attention")
FAST = backends("softmax_attention", but="reference")
CPU = Place("cpu", torch.float64)


def place_for(backend: str) -> Place:
    return place_of(lambda device, dtype: SMALL.run_softmax(backend, Place(device, dtype)))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_gradcheck(backend: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in SMALL.leaves().values()]
    assert torch.autograd.gradcheck(lambda *x: SMALL.softmax(backend, 0.2)(*x), leaves)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
@pytest.mark.parametrize("window", [0, 3])
def test_no_tokens_give_empty_outputs_and_zero_gradients(backend: str, lengths: tuple[int, ...], window: int) -> None:
    case = dataclasses.replace(SMALL, lengths=lengths, num_targets=(0,) * len(lengths), max_attn_len=window)
    results = case.run_softmax(backend, place_for(backend), 0.3)
    assert results["out"].shape == results["v"].shape == (0, 2, 3)
    assert results["q"].shape == results["k"].shape == (0, 2, 2)
    assert results["position_weight"].shape == (9,)
    assert results["time_weight"].shape == (13,)
    assert not results["time_weight"].any()
    assert not results["position_weight"].any()


# --- faster backends against the reference


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Gradients of scores sum to zero: what cancels in a table's is of the size of 1, however small they are."""
    tables = ("position_weight", "time_weight")
    for names, floor in ((tables, 1.0), (set(expected) - set(tables), 0.01)):
        parts = ({name: x for name, x in results.items() if name in names} for results in (actual, expected))
        assert_all_close(*parts, tolerance, floor)


@pytest.mark.parametrize("backend", FAST)
def test_forward_and_gradients_equal_the_reference(backend: str) -> None:
    place = place_for(backend)

    @examples(120)
    @given(attention_cases(), st.sampled_from([0.0, 0.0, 0.2, 0.9]))
    def check(case: AttentionCase, dropout: float) -> None:
        with unsupported_rejected():
            actual = case.run_softmax(backend, place, dropout)
        assert_close(actual, case.run_softmax("reference", CPU, dropout), place.tolerance)

    check()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bias", ["none", "position", "time"])
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize(("contextual", "window", "full"), [(0, 0, 0), (0, 9, 0), (0, 9, 70), (3, 0, 0), (70, 9, 4)])
def test_every_mask_with_every_bias_equals_the_reference(
    backend: str, bias: str, targets: bool, contextual: int, window: int, full: int
) -> None:
    place = place_for(backend)
    case = AttentionCase(
        lengths=(129, 0, 65),
        num_targets=(66, 0, 3) if targets else None,
        contextual_seq_len=contextual,
        max_attn_len=window,
        min_full_attn_seq_len=full,
        bias=bias,
        times="tied",
    )
    for causal in (True, False):
        case = dataclasses.replace(case, causal=causal)
        expected = case.run_softmax("reference", CPU, 0.1)
        assert_close(case.run_softmax(backend, place, 0.1), expected, place.tolerance)


@pytest.mark.parametrize("backend", FAST)
def test_scores_far_apart_and_far_from_zero(backend: str) -> None:
    place = place_for(backend)
    case = AttentionCase((70, 3), alpha=300.0)  # exponentials of thousands
    results = case.run_softmax(backend, place)
    assert all(bool(x.isfinite().all()) for x in results.values())
    out = {"out": results["out"]}
    assert_all_close(out, {"out": case.run_softmax("reference", CPU)["out"]}, max(place.tolerance, 1e-9) * 50)


@pytest.mark.parametrize("backend", ALL)
def test_a_token_that_sees_itself_alone_has_no_gradient_of_scores(backend: str) -> None:
    results = AttentionCase((1, 1), bias="time").run_softmax(backend, place_for(backend))
    for name in ("q", "k", "position_weight", "time_weight"):
        assert not results[name].any(), name


@pytest.mark.parametrize("backend", ALL)
def test_later_tokens_and_other_candidates_do_not_reach_a_row(backend: str) -> None:
    place = place_for(backend)
    case = AttentionCase((136,), (66,), 136, bias="position")
    leaves = case.leaves(place.dtype, place.device)
    changed = {n: torch.cat([x[:70], x[70:71], x[71:] + 1]) if n in "qkv" else x for n, x in leaves.items()}
    run = case.softmax(backend, 0.2, place.device)
    assert torch.equal(run(**leaves)[:71], run(**changed)[:71])


@pytest.mark.parametrize("at_once", [1, 3 * 64 * 64])
def test_tiled_gives_the_same_however_few_tiles_it_takes_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = EVERYTHING.run_softmax("reference", CPU, 0.1)
    monkeypatch.setattr(attention_tiles, "SCORES_AT_ONCE", at_once)
    assert_all_close(EVERYTHING.run_softmax("tiled", CPU, 0.1), expected, CPU.tolerance)


def request_of(case: AttentionCase, leaves: dict[str, Tensor]) -> SoftmaxAttentionRequest:
    targets = None if case.num_targets is None else torch.tensor(case.num_targets)
    q, k, v, position_weight, time_weight = leaves.values()
    return SoftmaxAttentionRequest(
        q, k, v, lengths_to_offsets(torch.tensor(case.lengths)), targets, position_weight, time_weight,
        *case.query_and_key_times(), case.dropout_keys(), case.max_seq_len, 1.0, 0.1,
        MaskRule(case.causal, case.contextual_seq_len),
    )  # fmt: skip


@pytest.mark.parametrize("rest", [{}, {"causal": False}, {"num_targets": (1000, 300), "contextual_seq_len": 70}])
def test_tiled_makes_no_tensor_that_grows_with_the_square_of_the_length(rest: dict[str, Any]) -> None:
    case = AttentionCase((2200, 1320), max_seq_len=4096, heads=1, qk_dim=2, v_dim=2, bias="time", **rest)
    leaves = case.leaves(torch.float32)
    given = request_of(case, leaves)
    with LargestTensor() as watch:
        softmax_attention_tiled.backward(given, softmax_attention_tiled.forward(given))
    assert watch.elements <= attention_tiles.SCORES_AT_ONCE < 1320**2


def test_dropout_does_not_depend_on_the_batch() -> None:
    case = dataclasses.replace(SMALL, lengths=(4, 6), max_seq_len=6)
    keys = case.dropout_keys()
    q, k, v = (leaf[4:] for name, leaf in case.leaves().items() if name in "qkv")
    alone = softmax_attention(
        q, k, v, torch.tensor([0, 6]), max_seq_len=6, scale=1.0, dropout=0.5, dropout_keys=keys[4:], backend="reference"
    )
    leaves = {name: leaf for name, leaf in case.leaves().items() if name in "qkv"}
    assert torch.equal(case.softmax("reference", 0.5)(**leaves)[4:], alone)
    kept = case.softmax("reference", 0.0)(**leaves)[4:]
    assert not torch.equal(kept, alone)


def test_the_default_scale_is_that_of_transformers() -> None:
    q, k, v = torch.randn(3, 5, 2, 16)
    offsets = torch.tensor([0, 5])
    heads = (x.transpose(0, 1) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1)
    torch.testing.assert_close(softmax_attention(q, k, v, offsets, max_seq_len=5), expected)


def arguments(backend: str, bias: bool) -> tuple[object, ...]:
    leaves = [leaf.float() for leaf in SMALL.leaves().values()]
    tables = (*leaves[3:], *SMALL.query_and_key_times()) if bias else (None,) * 4
    return (*leaves[:3], torch.tensor([0, 4, 4, 5]), None, *tables, None, 5, 1.0, 0.0, True, 0, 0, 0, backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_schema_and_fake_kernels(backend: str, bias: bool) -> None:
    opcheck("softmax_attention", backend, arguments(backend, bias))
    opcheck("softmax_attention_backward", backend, (torch.ones(5, 2, 3), *arguments(backend, bias)))


def test_schema_and_fake_kernels_of_the_vendor_s() -> None:
    with registered(*vendor.FUSION_ATTENTION):
        opcheck("softmax_attention", "vendor", arguments("vendor", False))
        opcheck("softmax_attention_backward", "vendor", (torch.ones(5, 2, 3), *arguments("vendor", False)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(())}, "must be"),
        ({"q": torch.zeros(4, 2)}, "must be"),
        ({"k": torch.zeros(5, 2, 4, dtype=torch.float64)}, "one dtype"),
        ({"offsets": torch.tensor([0, 5], dtype=torch.int32)}, "int64"),
        ({"offsets": torch.tensor([0, 4])}, "offsets must rise from 0 to T = 5"),
        ({"max_seq_len": 4}, "a sequence has 5 tokens, max_seq_len is 4"),
        ({"num_targets": torch.tensor([6])}, "num_targets must be between"),
        ({"num_targets": torch.tensor([1, 1])}, "num_targets must be"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"dropout_keys": torch.zeros(4, dtype=torch.int64)}, "dropout_keys must be"),
        ({"max_attn_len": -1}, "max_attn_len must be 0 or more"),
        ({"max_seq_len": 0}, "max_seq_len must be 1 or more"),
        ({"scale": float("inf")}, "scale must be finite"),
        (dict.fromkeys("qkv", torch.zeros(5, 2, 4, dtype=torch.int64)), "q must be float64, float32"),
        (dict.fromkeys("qkv", torch.zeros(5, 0, 4)), "heads and their widths must be 1 or more"),
    ],
)
def test_wrong_values_are_errors(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = dict.fromkeys("qkv", torch.zeros(5, 2, 4))
    given |= {"offsets": torch.tensor([0, 5]), "max_seq_len": 5} | change
    with pytest.raises(ValueError, match=message):
        softmax_attention(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q must be a tensor, got NoneType"),
        ({"bias": torch.zeros(9)}, "bias must be a RelativeBias or None, got Tensor"),
        ({"max_seq_len": 5.5}, "max_seq_len must be an integer, got 5.5"),
        ({"dropout": "0.1"}, "dropout must be a number"),
    ],
)
def test_wrong_types_are_errors(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = dict.fromkeys("qkv", torch.zeros(5, 2, 4))
    given |= {"offsets": torch.tensor([0, 5]), "max_seq_len": 5} | change
    with pytest.raises(TypeError, match=message):
        softmax_attention(**given)  # type: ignore[arg-type]


# --- torch_npu's operator


@examples(60)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 5]),
    dims=st.sampled_from([(16, 16), (3, 7), (7, 3)]),
    seed=st.integers(0, 999),
)
def test_the_vendor_operator_gives_the_reference(
    lengths: list[int], causal: bool, window: int, dims: tuple[int, int], seed: int
) -> None:
    case = AttentionCase(
        tuple(lengths), max_seq_len=20, qk_dim=dims[0], v_dim=dims[1], alpha=0.3, causal=causal,
        max_attn_len=window if causal else 0, seed=seed,
    )  # fmt: skip
    with registered(*vendor.FUSION_ATTENTION):
        actual = forward_and_gradients(case.softmax("vendor"), case.leaves(torch.float32), seed)
    assert_all_close(actual, forward_and_gradients(case.softmax("reference"), case.leaves(), seed), 2e-5)


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """PyTorch's FlashAttention, computing its formula on the CPU in float64, and taken for there."""

    def weights(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float, left: int | None) -> Tensor:
        length = rows.stop - rows.start
        row, column = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = (column <= row) if causal else torch.ones(length, length, dtype=torch.bool)
        seen = seen if left is None else seen & (row - column <= left)
        scores = torch.einsum("ihd,jhd->hij", q[rows].double(), k[rows].double()) * scale
        return scores.masked_fill(~seen, -torch.inf).softmax(2)

    def sequences(ends: Tensor, longest: int) -> list[slice]:
        assert ends.dtype == torch.int32
        rows = [slice(a, b) for a, b in pairwise(ends.tolist()) if a < b]
        assert all(own.stop - own.start <= longest for own in rows)
        return rows

    def forward(
        q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, **rest,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert q.shape == k.shape == v.shape
        assert q.shape[2] % 8 == 0
        out = torch.zeros_like(v)
        for rows in sequences(cum_seq_q, max_q):
            attention = weights(q, k, rows, is_causal, scale, window_size_left)
            out[rows] = torch.einsum("hij,jhd->ihd", attention, v[rows].double()).to(v.dtype)
        return out, out.new_zeros(7), torch.tensor(3), torch.tensor(4), out.new_zeros(0)

    def backward(
        grad, q, k, v, out, sums, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, state, unused, *,
        scale=None, window_size_left=None, window_size_right=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert (sums.shape, int(state), int(unused)) == ((7,), 3, 4)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows in sequences(cum_seq_q, max_q):
            attention = weights(q, k, rows, is_causal, scale, window_size_left)
            g = grad[rows].double()
            d_attention = torch.einsum("ihd,jhd->hij", g, v[rows].double())
            inner = (g * out[rows].double()).sum(2).t().unsqueeze(2)
            d_scores = attention * (d_attention - inner) * scale
            dq[rows] = torch.einsum("hij,jhd->ihd", d_scores, k[rows].double()).to(q.dtype)
            dk[rows] = torch.einsum("hij,ihd->jhd", d_scores, q[rows].double()).to(k.dtype)
            dv[rows] = torch.einsum("hij,ihd->jhd", attention, g).to(v.dtype)
        return dq, dk, dv

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    try:
        with patch.object(softmax_attention_flash, "card_refused", return_value=None):
            yield
    finally:
        library._destroy()


@examples(40)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 5]),
    dims=st.sampled_from([(16, 16), (3, 7), (7, 3)]),
    seed=st.integers(0, 999),
)
def test_flash_attention_is_called_as_it_wants(
    lengths: list[int], causal: bool, window: int, dims: tuple[int, int], seed: int
) -> None:
    """Its formula in bfloat16 against the reference."""
    case = AttentionCase(
        tuple(lengths), max_seq_len=20, qk_dim=dims[0], v_dim=dims[1], alpha=0.3, causal=causal,
        max_attn_len=window if causal else 0, seed=seed,
    )  # fmt: skip
    leaves = case.leaves(torch.bfloat16)
    with flash_on_cpu():
        actual = forward_and_gradients(case.softmax("flash"), leaves, seed)
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    assert_all_close(actual, forward_and_gradients(case.softmax("reference"), exact, seed), 3e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_on_a_card(dtype: torch.dtype, window: int) -> None:
    case = AttentionCase((30, 2, 17), max_seq_len=30, qk_dim=16, v_dim=12, alpha=0.25, max_attn_len=window)
    leaves = {name: leaf.to("cuda", dtype) for name, leaf in case.leaves().items()}
    exact = {name: leaf.cpu().double() for name, leaf in leaves.items()}
    expected = forward_and_gradients(case.softmax("reference"), exact, 1)
    actual = forward_and_gradients(case.softmax("flash", device="cuda"), leaves, 1)
    plain = max_error(forward_and_gradients(case.softmax("reference", device="cuda"), leaves, 1), expected)
    for name, error in max_error(actual, expected).items():
        assert error <= 3 * plain[name] + 1e-6, name


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"position_weight": torch.zeros(15)}, "takes no bias for packed sequences"),
        ({"dropout": 0.1, "dropout_keys": torch.arange(8)}, "its dropout is not drawn from keys"),
        ({"num_targets": torch.tensor([1, 0])}, "has no mask of targets and contextual tokens"),
        ({"rule": MaskRule(contextual_seq_len=1)}, "has no mask of targets and contextual tokens"),
        ({"rule": MaskRule(False, max_attn_len=2)}, "a local window is causal and the same for all rows"),
        ({"dtype": torch.float32}, "the dtype is torch.float32; float16, bfloat16"),
        ({"width": 257}, "the head width is 257; 1 to 256"),
        ({}, None),
    ],
)
def test_what_flash_attention_takes(more: dict[str, Any], reason: str | None) -> None:
    asked = request(**{"dtype": torch.bfloat16, **more})
    assert softmax_attention_flash.supports(asked) == "the tensors are on cpu"
    with flash_on_cpu():
        assert softmax_attention_flash.supports(asked) == reason


@pytest.mark.parametrize("backend", ["vendor", "cpp", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_errs_no_more_than_plain_pytorch(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpp" and unusable():
        pytest.skip(f"cpp: {unusable()}")
    case = AttentionCase((30, 2, 17), max_seq_len=30, qk_dim=16, v_dim=16, alpha=0.25)
    leaves = {name: leaf.to(dtype) for name, leaf in case.leaves().items()}
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    expected = forward_and_gradients(case.softmax("reference"), exact, 1)
    with registered(*vendor.FUSION_ATTENTION):
        actual = forward_and_gradients(case.softmax(backend), leaves, 1)
    plain = max_error(forward_and_gradients(case.softmax("reference"), leaves, 1), expected)
    for name, error in max_error(actual, expected).items():
        assert error <= 3 * plain[name] + 1e-6, name


def request(
    lengths: tuple[int, ...] = (5, 3), *, heads: int = 2, width: int = 16, dtype: torch.dtype = torch.float32,
    rule: MaskRule = MaskRule(), **more: object,  # noqa: B008
) -> SoftmaxAttentionRequest:  # fmt: skip
    q = torch.empty(1, 1, 1, dtype=dtype).expand(sum(lengths), heads, width)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    made = SoftmaxAttentionRequest(
        q, q, q, offsets, None, None, None, None, None, None, 8, 1.0, 0.0, rule
    )  # fmt: skip
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def test_without_torch_npu_the_reason_names_it() -> None:
    assert BACKEND.supports(request()) == "no npu::npu_fusion_attention: torch_npu is for Ascend NPUs"


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (request(position_weight=torch.zeros(15)), "takes no bias for packed sequences"),
        (request(dropout=0.1, dropout_keys=torch.arange(8)), "its dropout is not drawn from keys"),
        (request(num_targets=torch.tensor([1, 0])), "has no mask of targets and contextual tokens"),
        (request(rule=MaskRule(contextual_seq_len=1)), "has no mask of targets and contextual tokens"),
        (request(rule=MaskRule(False, max_attn_len=2)), "a local window is causal and the same for all rows"),
        (
            request(rule=MaskRule(max_attn_len=2, min_full_attn_seq_len=1)),
            "a local window is causal and the same for all rows",
        ),
        (request(dtype=torch.float64), "the dtype is torch.float64; float32, float16, bfloat16"),
        (request(()), "the batch is 0; 1 to 1024"),
        (request((1,) * 1025), "the batch is 1025; 1 to 1024"),
        (request((0,)), "T is 0; 1 to 1048576"),
        (request((2**20 + 1,)), "T is 1048577; 1 to 1048576"),
        (request(heads=257), "the number of heads is 257; 1 to 256"),
        (request(width=769), "the head width is 769; 1 to 768"),
    ],
)
def test_each_limit(refused: SoftmaxAttentionRequest, reason: str) -> None:
    with registered(*vendor.FUSION_ATTENTION):
        assert BACKEND.supports(refused) == reason


@pytest.mark.parametrize(
    "taken",
    [
        request((5, 0, 3)),
        request((1,) * 1024),
        request((2**20,), heads=1, width=1),
        request(heads=256),
        request(width=768),
        request(dropout=0.1),
        request(rule=MaskRule(max_attn_len=2)),
        request(rule=MaskRule(False)),
    ],
)
def test_within_its_limits_it_is_taken(taken: SoftmaxAttentionRequest) -> None:
    with registered(*vendor.FUSION_ATTENTION):
        assert BACKEND.supports(taken) is None


def test_an_older_schema_is_refused() -> None:
    (schema, function), backward = vendor.FUSION_ATTENTION
    old = schema.replace("int[]? actual_seq_qlen=None", "Tensor? actual_seq_qlen=None")
    with registered((old, function), backward):
        reason = BACKEND.supports(request())
    assert reason == (
        "npu::npu_fusion_attention: 'actual_seq_qlen' is Optional[Tensor], not Optional[List[int]]: "
        "another release of torch_npu"
    )


def test_the_order_of_auto() -> None:
    select = OPERATORS["softmax_attention"].select
    compiled = unusable() is None
    assert select(request(), "auto").name == ("cpp" if compiled else "tiled")
    assert select(request(dtype=torch.float64), "auto").name == "tiled"
    with registered(*vendor.FUSION_ATTENTION):
        assert select(request(), "auto").name == ("cpp" if compiled else "vendor")
