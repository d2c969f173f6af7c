"""`softmax_attention`: the reference against loops written from the definition, the backends against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
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
    one_thread,  # noqa: F401
    opcheck,
    place_of,
    unsupported_rejected,
)
from torch import Tensor

from npu_rec.ops import attention_tiles, softmax_attention, softmax_attention_tiled
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.masks import MaskRule
from npu_rec.ops.random import derive_keys, dropout_scale
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest
from npu_rec.ops.time_buckets import time_bucket_reference


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
