"""`hstu_attention`: every backend against the reference, the reference against a loop written from the definition."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
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
    max_error,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
    unsupported_rejected,
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import (
    OPERATORS,
    Backend,
    RelativeBias,
    attention_tiles,
    hstu_attention,
    hstu_attention_reference,
    hstu_attention_tiled,
)
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.masks import MaskRule

ALL = backends("hstu_attention", interpreted=False)  # Triton under its interpreter: test_triton_attention.py
FAST = backends("hstu_attention", but="reference", interpreted=False)
CPU = Place("cpu", torch.float64)
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
PLAIN = AttentionCase(lengths=(70, 0, 1, 130), max_seq_len=131, bias="time")
SMALL = AttentionCase(lengths=(4, 0, 1), max_seq_len=5, heads=2, qk_dim=2, v_dim=3, buckets=12)


def place_for(backend: str) -> Place:
    return place_of(lambda device, dtype: SMALL.run(backend, Place(device, dtype)))


# --- against the reference


@pytest.mark.parametrize("backend", FAST)
def test_forward_and_gradients_equal_the_reference(backend: str) -> None:
    place = place_for(backend)

    @examples(120)
    @given(attention_cases())
    def check(case: AttentionCase) -> None:
        with unsupported_rejected():
            actual = case.run(backend, place)
        assert_all_close(actual, case.run("reference", CPU), place.tolerance)

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
        assert_all_close(case.run(backend, place), case.run("reference", CPU), place.tolerance)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("window", [0, 3])
def test_no_tokens_give_empty_outputs_and_zero_gradients(backend: str, lengths: tuple[int, ...], window: int) -> None:
    place = place_for(backend)
    case = AttentionCase(lengths, num_targets=(0,) * len(lengths), max_attn_len=window, bias="time")
    results = case.run(backend, place)
    assert results["out"].shape == (0, case.heads, case.v_dim)
    assert results["q"].shape == results["k"].shape == (0, case.heads, case.qk_dim)
    assert results["position_weight"].shape == (2 * case.max_seq_len - 1,)
    assert results["time_weight"].shape == (case.buckets + 1,)
    assert not results["position_weight"].any()
    assert not results["time_weight"].any()


@pytest.mark.parametrize("backend", ALL)
def test_empty_sequences_between_others_change_nothing(backend: str) -> None:
    place = place_for(backend)
    packed = dataclasses.replace(EVERYTHING, lengths=(70, 130), num_targets=(3, 66))
    gaps = dataclasses.replace(EVERYTHING, lengths=(0, 70, 0, 0, 130, 0), num_targets=(0, 3, 0, 0, 66, 0))
    assert_all_close(gaps.run(backend, place), packed.run(backend, place), place.tolerance)


# --- against the definition


def bucket_of(seconds: int, buckets: int) -> int:
    """bucket(d) = clamp(trunc(ln(max(|d|, 1)) / 0.301), 0, buckets), logarithm and division in float32."""
    logarithm = np.float32(math.log(float(np.float32(max(abs(seconds), 1)))))
    return min(max(math.trunc(float(logarithm / np.float32(0.301))), 0), buckets)


def ids_of(case: AttentionCase, n: int, t: int) -> tuple[list[int], int]:
    c = case.contextual_seq_len
    limit = n - t if c == 0 else n - c + 1 - t
    ids = [p if c == 0 else max(p - c + 1, 0) for p in range(n)]
    return ([min(i, limit) for i in ids] if case.num_targets is not None else ids), limit


def sees(case: AttentionCase, i: int, j: int, ids: list[int], limit: int) -> bool:
    """Whether query place i attends to key place j: the rules of the mask, one after the other."""
    w, f = case.max_attn_len, case.min_full_attn_seq_len
    yes = i == j or (ids[i] > ids[j] if case.causal else ids[i] != ids[j])
    if w > 0:
        yes = yes and (ids[i] - ids[j] <= w or (f > 0 and ids[i] >= limit - f))
    if case.contextual_seq_len > 0:
        yes = yes or (ids[i] == 0 and ids[j] < limit)
    return yes


def attention_by_loops(case: AttentionCase) -> list[list[list[float]]]:
    """`out[token][head][channel]`."""
    leaves = {name: leaf.tolist() for name, leaf in case.leaves().items()}
    query_time, key_time = (times.tolist() for times in case.query_and_key_times())
    out, start = [], 0
    for b, n in enumerate(case.lengths):
        ids, limit = ids_of(case, n, 0 if case.num_targets is None else case.num_targets[b])
        for i in range(n):
            row = [[0.0] * case.v_dim for _ in range(case.heads)]
            for j in range(n):
                if not sees(case, i, j, ids, limit):
                    continue
                bias = 0.0
                if case.bias != "none":
                    bias += leaves["position_weight"][case.max_seq_len - 1 + ids[j] - ids[i]]
                if case.bias == "time":
                    delta = query_time[start + i] - key_time[start + j]
                    bias += leaves["time_weight"][bucket_of(delta, case.buckets)]
                for h in range(case.heads):
                    products = zip(leaves["q"][start + i][h], leaves["k"][start + j][h], strict=True)
                    score = case.alpha * sum(a * b for a, b in products) + bias
                    weight = score / (1.0 + math.exp(-score)) / (case.divisor or case.max_seq_len)
                    row[h] = [o + weight * x for o, x in zip(row[h], leaves["v"][start + j][h], strict=True)]
            out.append(row)
        start += n
    return out


@examples(150)
@given(attention_cases(largest=9, widest=3))
def test_reference_equals_the_definition_in_loops(case: AttentionCase) -> None:
    out = torch.tensor(attention_by_loops(case), dtype=torch.float64).reshape(-1, case.heads, case.v_dim)
    torch.testing.assert_close(case.call("reference")(**case.leaves()), out, rtol=1e-12, atol=1e-12)


def visible(backend: str, case: AttentionCase, dtype: torch.dtype) -> list[list[int]]:
    """For each token of the only sequence the places that reach its output, by gradient of v."""
    leaves = case.leaves(dtype)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: case.call(backend)(leaves["q"], leaves["k"], v), leaves["v"]
    )
    reached = jacobian.abs().sum((1, 2, 4, 5)) > 0
    return [row.nonzero().flatten().tolist() for row in reached]


@pytest.mark.parametrize("backend", ALL)
def test_masks_of_a_sequence_of_six_are_these(backend: str) -> None:
    place = place_for(backend)
    if place.device != "cpu":
        pytest.skip("the same on every device")
    case = AttentionCase((6,), heads=1, qk_dim=2, v_dim=2)
    seen = functools.partial(visible, backend, dtype=place.dtype)
    history = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert seen(case) == history
    two_targets = dataclasses.replace(case, num_targets=(2,))
    assert seen(two_targets) == [*history[:4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]
    window = dataclasses.replace(case, max_attn_len=1)
    assert seen(window) == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    # both targets have id 4: a window of 1 leaves them token 3 and themselves
    assert seen(dataclasses.replace(window, num_targets=(2,)))[4:] == [[3, 4], [3, 5]]
    # ids >= 6 - 2 keep the full window
    assert seen(dataclasses.replace(window, min_full_attn_seq_len=2))[3:] == [[2, 3], *history[4:]]
    # two contextual tokens see the whole history, not the targets
    context = dataclasses.replace(two_targets, contextual_seq_len=2)
    assert seen(context) == [[0, 1, 2, 3], [0, 1, 2, 3], *history[2:4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]
    both_ways = dataclasses.replace(two_targets, causal=False)
    assert seen(both_ways) == [list(range(6))] * 4 + [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]


# --- candidates


def candidates_case(history: int, targets: int, **rest: Any) -> AttentionCase:
    return AttentionCase((history + targets,), (targets,), history + targets + 2, bias="time", **rest)


@pytest.mark.parametrize("backend", ALL)
def test_a_candidate_scores_the_same_in_any_slot_and_alone(backend: str) -> None:
    place = place_for(backend)

    @examples(25)
    @given(
        history=st.sampled_from([0, 1, 5, 62, 64, 100]),
        targets=st.sampled_from([1, 2, 7, 70]),
        causal=st.booleans(),
        contextual=st.sampled_from([0, 0, 2]),
        window=st.sampled_from([0, 3, 64]),
        full=st.sampled_from([0, 2]),
        seed=st.integers(0, 1000),
    )
    def check(history: int, targets: int, causal: bool, contextual: int, window: int, full: int, seed: int) -> None:
        n = history + targets
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(n, 2, 4, generator=generator) for _ in range(3))
        key_time = torch.randint(0, 10**7, (n,), generator=generator)
        query_time = torch.cat([key_time[1:], key_time[-1:]])
        query_time[history:] = 10**7  # the request time
        position, time = torch.randn(2 * n + 3, generator=generator), torch.randn(129, generator=generator)

        def score(order: list[int]) -> Tensor:
            """Outputs of the candidates in that order, `[len(order), H, Dv]`."""
            rows = torch.tensor([*range(history), *(history + i for i in order)])
            parts = [x[rows].to(place.device, place.dtype) for x in (q, k, v)]
            weights = [w.to(place.device, place.dtype) for w in (position, time)]
            bias = RelativeBias(*weights, query_time[rows].to(place.device), key_time[rows].to(place.device))
            with unsupported_rejected():
                out = hstu_attention(
                    *parts,
                    torch.tensor([0, len(rows)], device=place.device),
                    max_seq_len=n + 2,
                    causal=causal,
                    num_targets=torch.tensor([len(order)], device=place.device),
                    contextual_seq_len=contextual,
                    max_attn_len=window,
                    min_full_attn_seq_len=full,
                    bias=bias,
                    backend=backend,
                )
            return out[history:].cpu().double()

        inside_context = history < contextual  # then "context" would reach into the candidates
        if inside_context:
            return
        together = score(list(range(targets)))
        shuffled = torch.randperm(targets, generator=generator).tolist()
        assert_all_close({"shuffled": score(shuffled)}, {"shuffled": together[shuffled]}, place.tolerance)
        for i in {0, targets // 2, targets - 1}:
            assert_all_close({"alone": score([i])[0:1]}, {"alone": together[i : i + 1]}, place.tolerance)

    check()


@pytest.mark.parametrize("backend", ALL)
def test_history_does_not_depend_on_the_candidates(backend: str) -> None:
    place = place_for(backend)
    case = candidates_case(70, 66)
    leaves = case.leaves(place.dtype, place.device)
    changed = {n: torch.cat([x[:70], x[70:] + 1]) if n in "qkv" else x for n, x in leaves.items()}
    run = case.call(backend, place.device)
    assert torch.equal(run(**leaves)[:70], run(**changed)[:70])


# --- precision


class _PlainRequest(HSTUAttentionRequest):
    """Lets the reference compute in the precision of its inputs, as ordinary PyTorch code would."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.q.dtype


def request_of(case: AttentionCase, leaves: dict[str, Tensor], kind: type = HSTUAttentionRequest) -> Any:
    query_time, key_time = case.query_and_key_times() if case.bias == "time" else (None, None)
    rule = MaskRule(case.causal, case.contextual_seq_len, case.max_attn_len, case.min_full_attn_seq_len)
    return kind(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        lengths_to_offsets(torch.tensor(case.lengths)),
        None if case.num_targets is None else torch.tensor(case.num_targets),
        leaves.get("position_weight"),
        leaves.get("time_weight"),
        query_time,
        key_time,
        case.max_seq_len,
        case.alpha,
        float(case.divisor or case.max_seq_len),
        rule,
    )


def plain_pytorch(case: AttentionCase, dtype: torch.dtype) -> dict[str, Tensor]:
    def run(**leaves: Tensor) -> Tensor:
        request = request_of(case, leaves, _PlainRequest)
        weights = leaves.get("position_weight"), leaves.get("time_weight")
        return hstu_attention_reference.attention(request, request.q, request.k, request.v, *weights)

    return forward_and_gradients(run, case.leaves(dtype), case.seed)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_low_precision_errs_at_most_twice_as_much_as_plain_pytorch(
    backend: str, dtype: torch.dtype, case: AttentionCase
) -> None:
    device = place_for(backend).device
    case = dataclasses.replace(case, qk_dim=20, v_dim=16, alpha=0.25, divisor=8.0)
    rounded = case.leaves(dtype)
    exact = forward_and_gradients(case.call("reference"), {n: x.double() for n, x in rounded.items()}, case.seed)
    allowed = max_error(plain_pytorch(case, dtype), exact)
    try:
        actual = case.run(backend, Place(device, dtype))
    except BackendError as error:
        pytest.skip(str(error))
    for name, error in max_error(actual, exact).items():
        scale = float(exact[name].abs().max())
        assert error <= 2 * allowed[name] + torch.finfo(dtype).eps * 0.1 * scale, name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_the_dtypes_of_their_inputs(backend: str, dtype: torch.dtype) -> None:
    device = place_for(backend).device
    leaves = {n: x.requires_grad_() for n, x in EVERYTHING.leaves(dtype, device).items()}
    for name in ("position_weight", "time_weight"):  # parameters often stay in float32
        leaves[name] = leaves[name].detach().float().requires_grad_()
    try:
        out = EVERYTHING.call(backend, device)(**leaves)
    except BackendError as error:
        pytest.skip(str(error))
    assert out.dtype == dtype
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves.values())


# --- gradients and registration by PyTorch's own checkers


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(backend: str, masked: bool) -> None:
    place = place_for(backend)
    if place.dtype != torch.float64:
        pytest.skip("gradcheck needs float64")
    case = dataclasses.replace(SMALL, bias="time", times="unsorted", alpha=0.5)
    if masked:
        case = dataclasses.replace(case, num_targets=(2, 0, 1), contextual_seq_len=1, max_attn_len=1)
    leaves = [leaf.requires_grad_() for leaf in case.leaves(device=place.device).values()]
    assert torch.autograd.gradcheck(case.call(backend, place.device), leaves)


@pytest.mark.parametrize("backend", FAST)
def test_an_input_without_gradient_does_not_disturb_the_others(backend: str) -> None:
    place = place_for(backend)
    full = EVERYTHING.run(backend, place)
    leaves = EVERYTHING.leaves(place.dtype, place.device)
    run = EVERYTHING.call(backend, place.device)
    frozen = {name: leaves.pop(name) for name in ("k", "position_weight")}
    partial = forward_and_gradients(lambda **rest: run(**frozen, **rest), leaves, EVERYTHING.seed)
    assert_all_close(partial, {name: full[name] for name in partial}, place.tolerance)


def operator_arguments(case: AttentionCase, backend: str, place: Place, *, requires_grad: bool) -> tuple[Any, ...]:
    leaves = {n: x.requires_grad_(requires_grad) for n, x in case.leaves(place.dtype, place.device).items()}
    r = request_of(case, leaves)
    tensors = (r.offsets, r.num_targets, r.position_weight, r.time_weight, r.query_time, r.key_time)
    moved = (None if x is None else x.to(place.device) for x in tensors)
    rule = (case.causal, case.contextual_seq_len, case.max_attn_len, case.min_full_attn_seq_len)
    return r.q, r.k, r.v, *moved, case.max_seq_len, case.alpha, r.divisor, *rule, backend


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        dataclasses.replace(SMALL, bias="position", num_targets=(1, 0, 1), causal=False),
        dataclasses.replace(SMALL, bias="time", contextual_seq_len=2, max_attn_len=2, min_full_attn_seq_len=1),
        AttentionCase((), bias="time"),
    ],
    ids=["no bias", "position", "time", "empty"],
)
def test_opcheck_of_the_operator_and_its_backward(backend: str, case: AttentionCase) -> None:
    place = place_for(backend)
    opcheck("hstu_attention", backend, operator_arguments(case, backend, place, requires_grad=True))
    arguments = operator_arguments(case, backend, place, requires_grad=False)
    grad = torch.randn_like(arguments[2])
    opcheck("hstu_attention_backward", backend, (grad, *arguments))


@pytest.mark.parametrize("backend", FAST)
def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    place = place_for(backend)
    first, second = (EVERYTHING.run(backend, place) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- memory


def largest_tensor(backend: Backend, case: AttentionCase) -> int:
    request = request_of(case, case.leaves(torch.float32))
    with LargestTensor() as watch:
        backend.backward(request, backend.forward(request))
    return watch.elements


def long_case(*lengths: int, **rest: Any) -> AttentionCase:
    return AttentionCase(lengths, max_seq_len=4096, **{"heads": 1, "qk_dim": 2, "v_dim": 2, "bias": "time", **rest})


@pytest.mark.parametrize(
    "rest",
    [
        {"heads": 5},  # one diagonal's tiles are too many to be taken at once
        {"causal": False},
        {"num_targets": (1000, 300), "contextual_seq_len": 70, "max_attn_len": 500, "min_full_attn_seq_len": 9},
    ],
    ids=["causal", "both ways", "every mask"],
)
def test_tiled_makes_no_tensor_that_grows_with_the_square_of_the_length(rest: dict[str, Any]) -> None:
    elements = largest_tensor(hstu_attention_tiled.BACKEND, long_case(2200, 1320, **rest))
    assert elements <= attention_tiles.SCORES_AT_ONCE < 1320**2


def test_the_measure_of_memory_sees_the_square_in_the_reference() -> None:
    assert largest_tensor(hstu_attention_reference.BACKEND, long_case(1100)) >= 1100**2


@pytest.mark.parametrize("at_once", [1, 3 * 64 * 64])
def test_tiled_gives_the_same_however_few_tiles_it_takes_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = EVERYTHING.run("reference", CPU)
    monkeypatch.setattr(attention_tiles, "SCORES_AT_ONCE", at_once)
    assert_all_close(EVERYTHING.run("tiled", CPU), expected, CPU.tolerance)


def test_every_backend_answers_supports_with_none_or_a_reason() -> None:
    request = request_of(SMALL, SMALL.leaves())
    for backend in OPERATORS["hstu_attention"].backends:
        answer = backend.supports(request)
        assert answer is None or (isinstance(answer, str) and answer)
