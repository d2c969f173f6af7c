"""`rms_norm`, `rotary` and `swiglu`: every backend against the formula, torch_npu's operators with stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vendor_standins_npu as vendor
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    assert_all_close,
    examples,
    forward_and_gradients,
    generator,
    max_error,
    normal,
    one_thread,  # noqa: F401
)
from torch import Tensor
from torch.nn.functional import silu
from vendor_standins import registered

from npu_rec.ops import OPERATORS, rms_norm, rotary, softmax_attention, swiglu
from npu_rec.ops.compiled import unusable
from npu_rec.ops.rms_norm_reference import RMSNormRequest
from npu_rec.ops.rotary_reference import RotaryRequest
from npu_rec.ops.swiglu_reference import SwiGLURequest

STAND_INS = [*vendor.RMS_NORM, *vendor.ROTARY, *vendor.SWIGLU]
COMPILED = pytest.param("cpp", marks=pytest.mark.skipif(unusable() is not None, reason=f"cpp kernels: {unusable()}"))
BACKENDS = ["reference", COMPILED, "vendor"]
Case = tuple[dict[str, Tensor], Callable[..., Tensor], Callable[..., Tensor]]


def rms_norm_case(tokens: int, width: int, backend: str) -> Case:
    """Leaves, the operator and the formula, both as functions of the leaves."""
    seed, width = generator(tokens + width), width + 1  # of one channel alone, x has all but no gradient
    leaves = {"x": normal(seed, tokens, width), "weight": normal(seed, width)}
    return (
        leaves,
        lambda x, weight: rms_norm(x, weight, eps=1e-3, backend=backend),
        lambda x, weight: x / ((x**2).mean(1, keepdim=True) + 1e-3) ** 0.5 * weight,
    )


def swiglu_case(tokens: int, width: int, backend: str) -> Case:
    leaves = {"x": normal(generator(tokens + width), tokens, 2 * width)}
    return leaves, lambda x: swiglu(x, backend=backend), lambda x: silu(x[:, :width]) * x[:, width:]


def rotary_case(tokens: int, width: int, backend: str, interleaved: bool) -> Case:
    """cos and sin of arbitrary angles, a different one for each channel."""
    seed = generator(tokens + width)
    leaves, angle = {"x": normal(seed, tokens, 3, 2 * width)}, normal(seed, tokens, 2 * width)

    def operator(x: Tensor) -> Tensor:
        return rotary(x, angle.cos().to(x), angle.sin().to(x), interleaved=interleaved, backend=backend)

    def formula(x: Tensor) -> Tensor:
        cos, sin, channels = angle.cos().to(x), angle.sin().to(x), []
        for i in range(2 * width):
            if interleaved:
                other, sign = (i + 1, -1.0) if i % 2 == 0 else (i - 1, 1.0)
            else:
                other, sign = (i + width, -1.0) if i < width else (i - width, 1.0)
            channels.append(x[..., i] * cos[:, None, i] + sign * x[..., other] * sin[:, None, i])
        return torch.stack(channels, 2)

    return leaves, operator, formula


CASES: dict[str, Callable[[int, int, str], Case]] = {
    "rms_norm": rms_norm_case,
    "swiglu": swiglu_case,
    "rotary": lambda *sizes: rotary_case(*sizes, interleaved=False),
    "rotary, interleaved": lambda *sizes: rotary_case(*sizes, interleaved=True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients_equal_the_formula(name: str, backend: str) -> None:
    @examples(40)
    @given(st.integers(1 if backend == "vendor" else 0, 40), st.integers(1, 40))
    def check(tokens: int, width: int) -> None:
        leaves, operator, formula = CASES[name](tokens, width, backend)
        exact = {key: leaf.double() for key, leaf in leaves.items()}
        expected = forward_and_gradients(formula, exact, 0)
        if backend == "reference":
            assert_all_close(forward_and_gradients(operator, exact, 0), expected, 1e-11)
        assert_all_close(forward_and_gradients(operator, leaves, 0), expected, 2e-5)

    with registered(*STAND_INS):
        check()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_computes_in_float32(name: str, backend: str, dtype: torch.dtype) -> None:
    leaves, operator, formula = CASES[name](30, 16, backend)
    leaves = {key: leaf.to(dtype) for key, leaf in leaves.items()}
    expected = forward_and_gradients(formula, {key: leaf.double() for key, leaf in leaves.items()}, 0)
    plain = max_error(forward_and_gradients(formula, leaves, 0), expected)
    with registered(*STAND_INS):
        results = forward_and_gradients(operator, leaves, 0)
    for key, error in max_error(results, expected).items():
        assert error <= 2 * plain[key] + 1e-6, key


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    leaves, operator, _ = CASES[name](3, 4, "reference")
    inputs = [leaf.double().requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(lambda *x: operator(**dict(zip(leaves, x, strict=True))), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "inputs", "constants"),
    [
        ("rms_norm", [(3, 8), (8,)], [1e-6]),
        ("swiglu", [(3, 8)], []),
        ("rotary", [(3, 2, 8), (3, 8), (3, 8)], [True]),
    ],
)
def test_schemas_and_fake_kernels(backend: str, name: str, inputs: list[tuple[int, ...]], constants: list[Any]) -> None:
    tensors = [normal(generator(4), *shape) for shape in inputs]
    with registered(*STAND_INS):
        arguments = (*tensors, *constants, backend)
        torch.library.opcheck(getattr(torch.ops.npu_rec, name).default, arguments)
        out = getattr(torch.ops.npu_rec, name)(*arguments)
        torch.library.opcheck(getattr(torch.ops.npu_rec, f"{name}_backward").default, (out, *arguments))


@pytest.mark.parametrize("name", CASES)
def test_no_tokens_give_an_empty_output_and_zero_gradients(name: str) -> None:
    leaves, operator, _ = CASES[name](0, 4, "auto")
    results = forward_and_gradients(operator, leaves, 0)
    assert results["out"].shape[0] == results["x"].shape[0] == 0
    assert not any(tensor.any() for tensor in results.values())


def test_wrong_shapes_are_errors() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x[0], torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[T, 2C\]"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="even D"):
        rotary(x[..., :3], x[:, 0, :3], x[:, 0, :3])
    with pytest.raises(ValueError, match="cos and sin"):
        rotary(x, x[:, 0, :2], x[:, 0])
    with pytest.raises(ValueError, match="eps must be a finite number"):
        rms_norm(x[0], torch.zeros(4), eps=-1.0)
    with pytest.raises(ValueError, match="x must be float64"):
        swiglu(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="sin must be a tensor"):
        rotary(x, x[:, 0], None)  # type: ignore[arg-type]


def test_with_softmax_attention_they_compile_without_a_graph_break() -> None:
    """As they stand in a layer of a Transformer."""

    def layer(x: Tensor, weight: Tensor, offsets: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = rotary(rms_norm(x, weight).view(-1, 2, 8), cos, sin)
        attended = softmax_attention(heads, heads, heads, offsets, max_seq_len=6, dropout=0.3, dropout_keys=keys)
        return swiglu(attended.flatten(1))

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((4, 0, 3), (6, 2)):
        total = sum(lengths)
        x, angle = normal(generator(total), total, 16), normal(generator(total), total, 8)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        rest = (offsets, torch.arange(total), angle.cos(), angle.sin())
        leaves = {"x": x, "weight": normal(generator(0), 16)}
        actual = forward_and_gradients(lambda rest=rest, **given: compiled(*given.values(), *rest), leaves, 0)
        expected = forward_and_gradients(lambda rest=rest, **given: layer(*given.values(), *rest), leaves, 0)
        assert_all_close(actual, expected, 1e-6)


# --- limits of torch_npu's operators


def rms(tokens: int = 2, x: torch.dtype = torch.float32, weight: torch.dtype = torch.float32) -> RMSNormRequest:
    return RMSNormRequest(torch.zeros(tokens, 8, dtype=x), torch.zeros(8, dtype=weight), 1e-6)


def turn(tokens: int = 2, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float32) -> RotaryRequest:
    x, angle = torch.zeros(tokens, heads, width, dtype=dtype), torch.zeros(tokens, width)
    return RotaryRequest(x, angle, angle, False)


def gated(tokens: int = 2, dtype: torch.dtype = torch.float32) -> SwiGLURequest:
    return SwiGLURequest(torch.zeros(tokens, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "request_", "reason"),
    [
        ("rms_norm", rms(), None),
        ("rms_norm", rms(x=torch.bfloat16), None),
        ("rms_norm", rms(x=torch.float16, weight=torch.float16), None),
        ("rms_norm", rms(x=torch.float16, weight=torch.bfloat16), "the dtype is torch.bfloat16; float32, float16"),
        ("rms_norm", rms(x=torch.float64), "the dtype is torch.float64; float32, float16, bfloat16"),
        ("rms_norm", rms(tokens=0), "T is 0; 1 to 2147483647"),
        ("rotary", turn(heads=999, width=894), None),
        ("rotary", turn(heads=1000), "the number of heads is 1000; 1 to 999"),
        ("rotary", turn(width=896), "the head width is 896; 2 to 894, a multiple of 2"),
        ("rotary", turn(tokens=0), "T is 0; 1 to 2147483647"),
        ("rotary", turn(dtype=torch.float64), "the dtype is torch.float64; float32, float16, bfloat16"),
        ("swiglu", gated(), None),
        ("swiglu", gated(tokens=0), "the tensor is empty"),
        ("swiglu", gated(dtype=torch.float64), "the dtype is torch.float64; float32, float16, bfloat16"),
    ],
)
def test_each_limit(name: str, request_: object, reason: str | None) -> None:
    backend = OPERATORS[name].find("vendor")
    assert (
        backend.supports(request_)
        == f"no npu::npu_{name if name != 'rotary' else 'rotary_mul'}: torch_npu is for Ascend NPUs"
    )
    with registered(*STAND_INS):
        assert backend.supports(request_) == reason


def test_the_first_arguments_name_may_differ_but_not_its_type() -> None:
    backend = OPERATORS["swiglu"].find("vendor")
    (schema, function), backward = vendor.SWIGLU
    with registered((schema.replace("Tensor self", "Tensor input"), function), backward):
        assert backend.supports(gated()) is None
    with registered((schema.replace("Tensor self", "Tensor[] input"), function), backward):
        assert backend.supports(gated()) == (
            "npu::npu_swiglu begins with other arguments: another release of torch_npu"
        )
