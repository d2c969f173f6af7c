"""`hstu_attention` through RecSDK's operators: against our reference with stand-ins, and every reason to refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import vendor_standins as vendor
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    AttentionCase,
    Place,
    assert_all_close,
    examples,
    forward_and_gradients,
    max_error,
    one_thread,  # noqa: F401
    opcheck,
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, hstu_attention
from npu_rec.ops import hstu_attention_vendor_limits as vendor_limits
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.masks import MaskRule

FLOAT32, EXACT = Place("cpu", torch.float32), Place("cpu", torch.float64)
ALL_FORMS = [*vendor.HSTU_JAGGED, *vendor.HSTU_V2, *vendor.HSTU_DENSE]
BACKEND = OPERATORS["hstu_attention"].find("vendor")


def request(
    lengths: tuple[int, ...] = (5, 3),
    *,
    targets: tuple[int, ...] | None = None,
    max_seq_len: int = 8,
    heads: int = 2,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    rule: MaskRule = MaskRule(),  # noqa: B008
) -> HSTUAttentionRequest:
    total = sum(lengths)
    q, k, v = torch.zeros(3, total, heads, width, dtype=dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    num_targets = None if targets is None else torch.tensor(targets)
    return HSTUAttentionRequest(
        q, k, v, offsets, num_targets, None, None, None, None, max_seq_len, 1.0, float(max_seq_len), rule
    )


@st.composite
def cases(draw: st.DrawFn) -> AttentionCase:
    """Calls that `hstu_jagged` takes: no empty sequence, all contextual tokens there."""
    context = draw(st.sampled_from([0, 0, 1, 4]))
    with_targets = draw(st.booleans())
    causal = draw(st.booleans()) or context > 0 or with_targets
    most = 9
    parts = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, most)), min_size=1, max_size=4))
    lengths = tuple(max(1, context + history + (target if with_targets else 0)) for history, target in parts)
    targets = tuple(min(target, n - context) for (_, target), n in zip(parts, lengths, strict=True))
    return AttentionCase(
        lengths=lengths,
        num_targets=targets if with_targets else None,
        max_seq_len=max(max(lengths), context + most + 1) + draw(st.sampled_from([0, 7])),
        heads=draw(st.integers(1, 3)),
        qk_dim=draw(st.sampled_from([16, 25, 1])),
        v_dim=draw(st.sampled_from([16, 25, 40])),
        alpha=draw(st.sampled_from([1.0, 0.25, -0.7])),
        divisor=draw(st.sampled_from([None, 1.0, 7.5])),
        causal=causal,
        contextual_seq_len=context,
        seed=draw(st.integers(0, 2**16)),
    )


@examples(120)
@given(cases())
def test_the_jagged_operator_gives_the_reference_with_every_mask_it_takes(case: AttentionCase) -> None:
    with vendor.registered(*vendor.HSTU_JAGGED):
        actual = case.run("vendor", FLOAT32)
    assert_all_close(actual, case.run("reference", EXACT), FLOAT32.tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alpha", [1.0, -0.7])
def test_the_dense_operator_gives_the_reference(causal: bool, alpha: float) -> None:
    case = AttentionCase((7, 1, 12), max_seq_len=14, qk_dim=25, v_dim=16, alpha=alpha, causal=causal, divisor=3.0)
    with vendor.registered(*vendor.HSTU_DENSE):
        actual = case.run("vendor", FLOAT32)
    assert_all_close(actual, case.run("reference", EXACT), FLOAT32.tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stand_ins", [vendor.HSTU_JAGGED, vendor.HSTU_V2], ids=["jagged", "v2"])
def test_low_precision_errs_no_more_than_plain_pytorch(dtype: torch.dtype, stand_ins: list[vendor.StandIn]) -> None:
    case = AttentionCase((30, 2, 17), max_seq_len=30, qk_dim=16, v_dim=32, alpha=0.25, causal=False)
    place = Place("cpu", dtype)
    leaves = {name: leaf.to(dtype).double() for name, leaf in case.leaves().items()}
    exact = forward_and_gradients(case.call("reference"), leaves, case.seed)
    with vendor.registered(*stand_ins):
        actual = case.run("vendor", place)
    plain = max_error(case.run("tiled", place), exact)
    for name, error in max_error(actual, exact).items():
        assert error <= 2 * plain[name] + 1e-6, name


def test_the_schema_and_the_fake_kernels_hold() -> None:
    case = AttentionCase((5, 3), max_seq_len=8, qk_dim=16, v_dim=16)
    q, k, v = case.leaves(torch.float32).values()
    offsets = torch.tensor([0, 5, 8])
    arguments = (q, k, v, offsets, None, None, None, None, None, 8, 1.0, 8.0, True, 0, 0, 0, "vendor")
    with vendor.registered(*vendor.HSTU_JAGGED):
        opcheck("hstu_attention", "vendor", arguments)
        opcheck("hstu_attention_backward", "vendor", (torch.ones_like(v), *arguments))


# --- the choice between forms and backends


def test_auto_takes_it_ahead_of_plain_pytorch_and_only_without_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS["hstu_attention"]
    monkeypatch.setattr(operator, "backends", [b for b in operator.backends if b.name not in ("cpp", "triton")])
    biased = dataclasses.replace(request(), position_weight=torch.zeros(15))
    assert operator.select(request(), "auto").name == "tiled"
    with vendor.registered(*ALL_FORMS):
        assert operator.select(request(), "auto").name == "vendor"
        assert operator.select(biased, "auto").name == "tiled"
        assert BACKEND.supports(biased) == "takes a bias only as a dense [B, H, N, N] tensor"


def test_forms_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def noted(stand_in: vendor.StandIn) -> vendor.StandIn:
        schema, function = stand_in

        def run(*args: object, **kwargs: object) -> object:
            called.append(schema.partition("(")[0])
            return function(*args, **kwargs)

        return schema, run

    q, k, v = torch.zeros(3, 8, 2, 16, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 5, 8])

    def call(*stand_ins: vendor.StandIn, causal: bool) -> str:
        with vendor.registered(*map(noted, stand_ins)):
            hstu_attention(q, k, v, offsets, max_seq_len=8, causal=causal, backend="vendor")
        return called.pop()

    assert call(*ALL_FORMS, causal=True) == "mxrec::hstu_jagged.equal"
    assert call(*vendor.HSTU_V2, *vendor.HSTU_DENSE, causal=False) == "mxrec::hstu_forward_v2"
    assert call(*vendor.HSTU_V2, *vendor.HSTU_DENSE, causal=True) == "mxrec::hstu_dense"


# --- reasons


def test_without_the_package_the_reason_names_it() -> None:
    reason = BACKEND.supports(request())
    assert reason == "no mxrec::hstu_jagged.equal: rec_ops is for Ascend NPUs"
    with pytest.raises(BackendError, match="backend 'vendor' cannot run here: no mxrec::hstu_jagged"):
        hstu_attention(*torch.zeros(3, 8, 2, 16), torch.tensor([0, 8]), max_seq_len=8, backend="vendor")


def renamed(stand_in: vendor.StandIn, old: str, new: str) -> vendor.StandIn:
    assert old in stand_in[0]
    return stand_in[0].replace(old, new), stand_in[1]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (", float? alpha=1.0", "", "has no argument 'alpha'"),
        ("Tensor seq_offset=None", "int[]? seq_offset=None", "'seq_offset' is Optional[List[int]], not Tensor"),
        ("(Tensor q", "(Tensor window, Tensor q", "wants an argument 'window' as well"),
    ],
)
def test_another_schema_is_refused(old: str, new: str, reason: str) -> None:
    forward, backward = vendor.HSTU_JAGGED
    with vendor.registered(renamed(forward, old, new), backward):
        found = BACKEND.supports(request())
    assert (
        found
        == f"jagged: mxrec::hstu_jagged.equal{':' if 'not' in reason else ''} {reason}: another release of rec_ops"
    )


def test_a_missing_backward_operator_is_refused() -> None:
    with vendor.registered(vendor.HSTU_JAGGED[0]):
        reason = BACKEND.supports(request())
    assert reason == "jagged: no mxrec::hstu_jagged_backward.equal: rec_ops is for Ascend NPUs"


def test_an_operator_without_a_kernel_for_the_device_is_refused() -> None:
    with vendor.registered(*vendor.HSTU_JAGGED):
        moved = dataclasses.replace(request(), q=torch.zeros(8, 2, 16, device="meta"))
        assert BACKEND.supports(moved) == "jagged: mxrec::hstu_jagged.equal has no kernel for meta"


def test_each_form_gives_its_reason() -> None:
    with vendor.registered(*ALL_FORMS):
        reason = BACKEND.supports(request((5, 0)))
    assert reason == (
        "jagged: a sequence of the batch is empty; v2: has no causal mask; dense: a sequence of the batch is empty"
    )


FULL = MaskRule(causal=False)


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (request(dtype=torch.float64), "the dtype is torch.float64; float32, float16, bfloat16"),
        (request(()), "the batch is 0; 1 to 2048"),
        (request((1,) * 2049), "the batch is 2049; 1 to 2048"),
        (request(max_seq_len=20481), "max_seq_len is 20481; 1 to 20480"),
        (request(heads=17), "the number of heads is 17; 1 to 16"),
        (request(width=513), "the head width is 513; 1 to 512"),
        (request((3, 0, 5)), "a sequence of the batch is empty"),
        (request(targets=(2, 1), rule=FULL), "contextual tokens and targets need causal attention"),
        (request(rule=MaskRule(False, 2)), "contextual tokens and targets need causal attention"),
        (
            request((200,), max_seq_len=300, rule=MaskRule(contextual_seq_len=129)),
            "contextual_seq_len is 129; 0 to 128",
        ),
        (request((513,), targets=(513,), max_seq_len=600), "the largest num_targets is 513; 0 to 512"),
        (request((8,), targets=(8,)), "contextual tokens and targets fill max_seq_len"),
        (
            request((5, 3), targets=(3, 0), rule=MaskRule(contextual_seq_len=3)),
            "a sequence has fewer than contextual_seq_len = 3 tokens before its targets",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_limit_of_the_jagged_operator(refused: HSTUAttentionRequest, reason: str) -> None:
    with vendor.registered(*vendor.HSTU_JAGGED):
        assert BACKEND.supports(refused) == f"jagged: {reason}"


@pytest.mark.parametrize(
    "taken",
    [
        request((1,) * 2048),
        request(max_seq_len=20480),
        request(heads=16),
        request(width=512),
        request((200,), max_seq_len=300, rule=MaskRule(contextual_seq_len=128)),
        request((512,), targets=(512,), max_seq_len=600),
        request((7, 3), targets=(7, 0)),
        request((5, 3), targets=(2, 0), rule=MaskRule(contextual_seq_len=3)),
        request(rule=FULL),
        request(dtype=torch.bfloat16),
    ],
)
def test_at_its_limits_the_jagged_operator_is_taken(taken: HSTUAttentionRequest) -> None:
    with vendor.registered(*vendor.HSTU_JAGGED):
        assert BACKEND.supports(taken) is None


def test_a_local_window_is_refused() -> None:
    with vendor.registered(*ALL_FORMS):
        assert BACKEND.supports(request(rule=MaskRule(max_attn_len=3))) == "has no local window"


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (request(dtype=torch.float32, rule=FULL), "the dtype is torch.float32; float16, bfloat16"),
        (request(dtype=torch.float16), "has no causal mask"),
        (request(dtype=torch.float16, targets=(1, 1), rule=FULL), "takes no contextual tokens and no targets"),
        (request(dtype=torch.float16, width=257, rule=FULL), "the head width is 257; 1 to 256"),
        (request(dtype=torch.float16, heads=17, rule=FULL), "the number of heads is 17; 1 to 16"),
    ],
)
def test_each_limit_of_the_second_version(refused: HSTUAttentionRequest, reason: str) -> None:
    with vendor.registered(*vendor.HSTU_V2):
        assert BACKEND.supports(refused) == f"v2: {reason}"
        assert BACKEND.supports(request(dtype=torch.float16, width=256, rule=FULL)) is None


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (request(targets=(1, 1)), "takes no contextual tokens and no targets"),
        (request(rule=MaskRule(contextual_seq_len=1)), "takes no contextual tokens and no targets"),
        (request(width=513), "the head width is 513; 1 to 512"),
        (
            request(max_seq_len=4096, heads=3),
            "its backward pass would allocate 384 MiB for [B, H, N, N]; up to 256",
        ),
    ],
)
def test_each_limit_of_the_dense_operator(refused: HSTUAttentionRequest, reason: str) -> None:
    with vendor.registered(*vendor.HSTU_DENSE):
        assert BACKEND.supports(refused) == f"dense: {reason}"
        assert BACKEND.supports(request(max_seq_len=4096)) is None


def test_targets_of_another_batch_with_the_same_offsets_are_looked_at_anew() -> None:
    first = request((5, 3), targets=(1, 1), rule=MaskRule(contextual_seq_len=2))
    with vendor.registered(*vendor.HSTU_JAGGED):
        assert BACKEND.supports(first) is None
        assert first.num_targets is not None
        fewer = dataclasses.replace(first, num_targets=torch.tensor([4, 0]))
        assert BACKEND.supports(fewer) is not None
        assert BACKEND.supports(dataclasses.replace(first, num_targets=None)) is None


def test_the_device_is_waited_for_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Tensor] = []
    look = vendor_limits.offsets_to_lengths
    monkeypatch.setattr(vendor_limits, "offsets_to_lengths", lambda offsets: looks.append(offsets) or look(offsets))
    x = torch.randn(8, 2, 16, requires_grad=True)
    offsets, targets = torch.tensor([0, 5, 8]), torch.tensor([1, 1])
    with vendor.registered(*vendor.HSTU_JAGGED):
        y = x
        for _ in range(3):
            y = hstu_attention(y, y, y, offsets, max_seq_len=8, num_targets=targets, backend="vendor")
        y.sum().backward()
    assert len(looks) == 1


def test_the_stand_in_refuses_what_is_out_of_limits() -> None:
    """The other half of the tests above: had an adapter let such a call through, it would have failed."""
    q = torch.zeros(4, 17, 16)
    with vendor.registered(*vendor.HSTU_JAGGED), pytest.raises(vendor.Refused, match="heads"):
        torch.ops.mxrec.hstu_jagged.equal(q, q, q, max_seq_len=4, seq_offset=torch.tensor([0, 4]))
    assert math.isclose(float(vendor.hstu_mask(3, 0, 2, 1, True).sum()), 5.0)
