"""`softmax_attention` by torch_npu's and PyTorch's fused kernels for packed sequences, which stand-ins compute here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import vendor_standins_npu as vendor
from hypothesis import given
from hypothesis import strategies as st
from strategies import AttentionCase, assert_all_close, examples, forward_and_gradients, max_error, opcheck
from test_ops_softmax_attention import arguments
from torch import Tensor
from vendor_standins import registered

from npu_rec.ops import OPERATORS, softmax_attention_flash
from npu_rec.ops.compiled import unusable
from npu_rec.ops.masks import MaskRule
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest

BACKEND = OPERATORS["softmax_attention"].find("vendor")


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


def kernels_of(backend: str) -> AbstractContextManager[Any]:
    return flash_on_cpu() if backend == "flash" else registered(*vendor.FUSION_ATTENTION)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("vendor", "float32", 2e-5), ("flash", "bfloat16", 3e-2)])
@examples(50)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 5]),
    dims=st.sampled_from([(16, 16), (3, 7), (7, 3)]),
    seed=st.integers(0, 999),
)
def test_the_kernel_is_called_as_it_wants_and_gives_the_reference(
    backend: str, dtype: str, tolerance: float, lengths: list[int], causal: bool, window: int, dims: tuple[int, int],
    seed: int,
) -> None:  # fmt: skip
    case = AttentionCase(
        tuple(lengths), max_seq_len=20, qk_dim=dims[0], v_dim=dims[1], alpha=0.3, causal=causal,
        max_attn_len=window if causal else 0, seed=seed,
    )  # fmt: skip
    leaves = case.leaves(getattr(torch, dtype))
    with kernels_of(backend):
        actual = forward_and_gradients(case.softmax(backend), leaves, seed)
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    assert_all_close(actual, forward_and_gradients(case.softmax("reference"), exact, seed), tolerance)


def test_schema_and_fake_kernels_of_the_vendor_s() -> None:
    with registered(*vendor.FUSION_ATTENTION):
        opcheck("softmax_attention", "vendor", arguments("vendor", False))
        opcheck("softmax_attention_backward", "vendor", (torch.ones(5, 2, 3), *arguments("vendor", False)))


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


BOTH_REFUSE = [
    ({"position_weight": torch.zeros(15)}, "takes no bias for packed sequences"),
    ({"dropout": 0.1, "dropout_keys": torch.arange(8)}, "its dropout is not drawn from keys"),
    ({"num_targets": torch.tensor([1, 0])}, "has no mask of targets and contextual tokens"),
    ({"rule": MaskRule(contextual_seq_len=1)}, "has no mask of targets and contextual tokens"),
    ({"rule": MaskRule(False, max_attn_len=2)}, "a local window is causal and the same for all rows"),
    (
        {"rule": MaskRule(max_attn_len=2, min_full_attn_seq_len=1)},
        "a local window is causal and the same for all rows",
    ),
]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        *BOTH_REFUSE,
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


def test_without_torch_npu_the_reason_names_it() -> None:
    assert BACKEND.supports(request()) == "no npu::npu_fusion_attention: torch_npu is for Ascend NPUs"


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        *((request(**more), reason) for more, reason in BOTH_REFUSE),
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
