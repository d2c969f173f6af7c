"""`hstu_attention` of the last tokens of each sequence alone: the rows that ordinary attention gives these tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    AttentionCase,
    Place,
    assert_all_close,
    attention_cases,
    backends,
    examples,
    forward_and_gradients,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, RelativeBias, attention_tiles, hstu_attention
from npu_rec.ops.compiled import ISA_VARIABLE, extension
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.masks import MaskRule, token_of_query

NO_QUERIES = ("triton", "triton_ascend", "vendor")  # they say that they take no query_offsets
ALL = [name for name in backends("hstu_attention") if name not in NO_QUERIES]
CPU = Place("cpu", torch.float64)


@dataclass(frozen=True)
class LastQueries:
    """A case of which the last `queries` tokens of each sequence ask."""

    case: AttentionCase
    queries: tuple[int, ...]

    def offsets(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Of the keys and of the queries."""
        both = (self.case.lengths, self.queries)
        keys, queries = (lengths_to_offsets(torch.tensor(x, dtype=torch.int64)).to(device) for x in both)
        return keys, queries

    def rows(self) -> Tensor:
        """`[Tq]`: which tokens ask; counted out, not computed by the function under test."""
        rows: list[int] = []
        start = 0
        for n, m in zip(self.case.lengths, self.queries, strict=True):
            rows += range(start + n - m, start + n)
            start += n
        return torch.tensor(rows, dtype=torch.int64)

    def leaves(self, place: Place = CPU) -> dict[str, Tensor]:
        leaves = self.case.leaves(place.dtype, place.device)
        return {**leaves, "q": leaves["q"][self.rows().to(place.device)]}

    def call(self, backend: str, place: Place, **leaves: Tensor) -> Tensor:
        case, device = self.case, place.device
        offsets, query_offsets = self.offsets(device)
        bias = None
        if case.bias != "none":
            query_time, key_time = case.query_and_key_times()
            times = (query_time[self.rows()].to(device), key_time.to(device)) if case.bias == "time" else ()
            bias = RelativeBias(leaves["position_weight"], leaves.get("time_weight"), *times)
        return hstu_attention(
            leaves["q"], leaves["k"], leaves["v"], offsets,
            max_seq_len=case.max_seq_len, alpha=case.alpha, divisor=case.divisor, causal=case.causal,
            num_targets=None if case.num_targets is None else torch.tensor(case.num_targets, device=device).long(),
            contextual_seq_len=case.contextual_seq_len, max_attn_len=case.max_attn_len,
            min_full_attn_seq_len=case.min_full_attn_seq_len, bias=bias, query_offsets=query_offsets, backend=backend,
        )  # fmt: skip

    def run(self, backend: str, place: Place) -> dict[str, Tensor]:
        """Output `[Tq, H, Dv]` and gradients in float64."""
        return forward_and_gradients(
            lambda **leaves: self.call(backend, place, **leaves), self.leaves(place), self.case.seed
        )

    def expected(self) -> dict[str, Tensor]:
        """The same from attention of all tokens, by the reference."""
        rows, whole, attend = self.rows(), self.case.leaves()["q"], self.case.call("reference")

        def run(q: Tensor, **leaves: Tensor) -> Tensor:
            return attend(q=whole.index_put((rows,), q), **leaves)[rows]

        return forward_and_gradients(run, self.leaves(), self.case.seed)


EVERY_MASK = LastQueries(
    AttentionCase(
        lengths=(70, 0, 1, 130, 66),
        num_targets=(3, 0, 1, 66, 0),
        max_seq_len=131,
        contextual_seq_len=2,
        max_attn_len=40,
        min_full_attn_seq_len=5,
        bias="time",
        times="unsorted",
    ),
    (69, 0, 1, 67, 0),
)
PLAIN = LastQueries(AttentionCase((200, 5, 0, 129), max_seq_len=200, bias="time"), (97, 5, 0, 1))


def place_for(backend: str) -> Place:
    return place_of(lambda device, dtype: PLAIN.run(backend, Place(device, dtype)))


@st.composite
def cases(draw: st.DrawFn) -> LastQueries:
    case = draw(attention_cases())
    return LastQueries(case, tuple(draw(st.sampled_from([0, n]) | st.integers(0, n)) for n in case.lengths))


@pytest.mark.parametrize("backend", ALL)
def test_results_and_gradients_are_rows_of_attention_over_all_tokens(backend: str) -> None:
    place = place_for(backend)

    @examples(80)
    @given(cases())
    def check(case: LastQueries) -> None:
        assert_all_close(case.run(backend, place), case.expected(), place.tolerance)

    check()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("bias", ["none", "position", "time"])
@pytest.mark.parametrize(("contextual", "window", "full"), [(0, 0, 0), (0, 9, 0), (0, 9, 70), (3, 0, 0), (70, 9, 4)])
def test_every_mask_across_the_borders_of_blocks(
    backend: str, bias: str, contextual: int, window: int, full: int
) -> None:
    place = place_for(backend)
    for causal in (True, False):
        for targets in (None, (66, 0, 3, 1)):
            case = AttentionCase(
                lengths=(129, 0, 65, 200),
                num_targets=targets,
                max_seq_len=200,
                causal=causal,
                contextual_seq_len=contextual,
                max_attn_len=window,
                min_full_attn_seq_len=full,
                bias=bias,
                times="tied",
            )
            queries = LastQueries(case, (100, 0, 64, 37))
            assert_all_close(queries.run(backend, place), queries.expected(), place.tolerance)


@pytest.mark.parametrize("case", [PLAIN, EVERY_MASK], ids=["plain", "every mask"])
def test_every_instruction_set_of_the_cpp_kernels(case: LastQueries, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension() is None:
        pytest.skip("npu_rec was built without C++ kernels")
    for isa in extension().instruction_sets():
        monkeypatch.setenv(ISA_VARIABLE, isa)
        place = Place("cpu", torch.float32)
        assert_all_close(case.run("cpp", place), case.expected(), place.tolerance)


@pytest.mark.parametrize("backend", ALL)
def test_the_last_three_of_six_tokens_see_these(backend: str) -> None:
    place = place_for(backend)
    case = LastQueries(AttentionCase((6,), heads=1, qk_dim=2, v_dim=2), (3,))

    def seen(**change: Any) -> list[list[int]]:
        changed = LastQueries(dataclasses.replace(case.case, **change), case.queries)
        leaves = changed.leaves(place)
        jacobian = torch.autograd.functional.jacobian(
            lambda v: changed.call(backend, place, q=leaves["q"], k=leaves["k"], v=v), leaves["v"]
        )
        return [row.nonzero().flatten().tolist() for row in jacobian.abs().sum((1, 2, 4, 5)) > 0]

    assert seen() == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert seen(num_targets=(2,)) == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]
    assert seen(max_attn_len=1) == [[2, 3], [3, 4], [4, 5]]


@pytest.mark.parametrize("backend", ALL)
def test_keys_that_no_query_sees_get_gradients_of_zero(backend: str) -> None:
    place = place_for(backend)
    case = LastQueries(AttentionCase((200, 90), max_seq_len=200, max_attn_len=2, bias="time"), (3, 0))
    results = case.run(backend, place)
    unseen = [*range(195), *range(200, 290)]
    assert not results["k"][unseen].any()
    assert not results["v"][unseen].any()
    assert results["k"][195:200].all()
    assert_all_close(results, case.expected(), place.tolerance)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("lengths", [(), (0,), (3, 0, 70)])
def test_no_queries_at_all_give_an_empty_output_and_zero_gradients(backend: str, lengths: tuple[int, ...]) -> None:
    place = place_for(backend)
    case = LastQueries(AttentionCase(lengths, bias="time"), (0,) * len(lengths))
    results = case.run(backend, place)
    assert results["out"].shape == (0, 2, 5)
    assert results["k"].shape == (sum(lengths), 2, 3)
    assert not any(results[name].any() for name in results)


@pytest.mark.parametrize("backend", ALL)
def test_every_token_a_query_is_the_ordinary_call(backend: str) -> None:
    place = place_for(backend)
    case = EVERY_MASK.case
    explicit, usual = LastQueries(case, case.lengths).run(backend, place), case.run(backend, place)
    assert all(torch.equal(explicit[name], usual[name]) for name in usual)


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck_and_opcheck(backend: str) -> None:
    place = place_for(backend)
    case = LastQueries(AttentionCase((4, 0, 2), max_seq_len=5, qk_dim=2, v_dim=3, bias="time", buckets=12), (2, 0, 2))
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves(place).items()}
    if place.dtype == torch.float64:
        names = list(leaves)
        assert torch.autograd.gradcheck(
            lambda *given: case.call(backend, place, **dict(zip(names, given, strict=True))), list(leaves.values())
        )
    offsets, query_offsets = case.offsets(place.device)
    query_time, key_time = (x.to(place.device) for x in case.case.query_and_key_times())
    rest = (
        offsets, None, leaves["position_weight"], leaves["time_weight"], query_time[case.rows()], key_time,
        5, 1.0, 5.0, True, 0, 0, 0, backend, query_offsets,
    )  # fmt: skip
    arguments = (leaves["q"], leaves["k"], leaves["v"], *rest)
    opcheck("hstu_attention", backend, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    grad = torch.randn(4, 2, 3, dtype=place.dtype, device=place.device)
    opcheck("hstu_attention_backward", backend, (grad, *detached))


def test_tiles_are_those_of_the_queries_alone() -> None:
    def tiles(queries: int) -> int:
        x = torch.zeros(1024, 1, 2)
        offsets, query_offsets = torch.tensor([0, 1024]), torch.tensor([0, queries])
        request = HSTUAttentionRequest(
            x[:queries], x, x, offsets, None, None, None, None, None, 1024, 1.0, 1.0, MaskRule(), query_offsets
        )
        return sum(len(tiles.query) for tiles in attention_tiles.tiles_of(request))

    assert tiles(1024) == 16 * 17 // 2
    assert tiles(128) == 15 + 16
    assert tiles(65) == 15 + 16
    assert tiles(1) == 16
    assert tiles(0) == 0


def test_token_of_query() -> None:
    rows = token_of_query(torch.tensor([0, 4, 4, 9]), torch.tensor([0, 1, 1, 4]), 4)
    assert rows.tolist() == [3, 6, 7, 8]
    assert token_of_query(torch.tensor([0]), torch.tensor([0]), 0).shape == (0,)


@pytest.mark.parametrize("backend", NO_QUERIES)
def test_backends_without_query_offsets_say_so(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = HSTUAttentionRequest.sample(torch.device("cpu"))
    request = dataclasses.replace(
        request, q=request.q[:1], query_offsets=torch.tensor([0, 0, 1]), position_weight=None, time_weight=None
    )
    # the vendor's packages are asked for first
    monkeypatch.setattr("npu_rec.ops.hstu_attention_vendor.FORMS", {"jagged": _Registered()})
    reason = OPERATORS["hstu_attention"].find(backend).supports(request)
    assert reason == "takes as many queries as keys, no query_offsets"
    with pytest.raises(BackendError, match=f"backend '{backend}' cannot run here: takes as many queries as keys"):
        OPERATORS["hstu_attention"].select(request, backend)
    assert OPERATORS["hstu_attention"].select(request, "auto").name in ALL


class _Registered:
    """Stands for an operator of the vendor that is there."""

    registered = True

    @property
    def operators(self) -> tuple[_Registered, _Registered]:
        return self, self


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query_offsets": torch.tensor([0, 2])}, r"query_offsets must be \[B \+ 1\] = \[3\], got \[2\]"),
        ({"query_offsets": torch.tensor([0, 1, 2])}, "query_offsets must rise from 0 to T = 3"),
        ({"query_offsets": torch.tensor([0, 4, 3])}, "query_offsets must rise from 0 to T = 3"),
        ({"query_offsets": torch.tensor([0, 0, 3])}, "query_offsets gives a sequence more queries than offsets"),
        ({"query_offsets": torch.tensor([0, 1, 3]).int()}, "query_offsets must be int64, got int32"),
        ({"query_offsets": None}, r"q, k, v must be .*\[3, 2, 3\], \[5, 2, 3\]"),
        (
            {"bias": RelativeBias(torch.zeros(7), torch.zeros(9), *torch.zeros(2, 5, dtype=torch.int64))},
            r"time_weight needs query_time of shape \[T\] = \[3\], got \[5\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_raise_value_error(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(3, 2, 3), "k": torch.zeros(5, 2, 3), "v": torch.zeros(5, 2, 4),
        "offsets": torch.tensor([0, 3, 5]), "query_offsets": torch.tensor([0, 1, 3]), "max_seq_len": 4,
    }  # fmt: skip
    for backend in ("auto", *ALL):
        with pytest.raises(ValueError, match=text):
            hstu_attention(**{**arguments, **change}, backend=backend)
