"""Arguments of another type, dtype or device: one clear error from every operator, whichever backend is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from strategies import backends, one_thread  # noqa: F401
from torch import Tensor

from npu_rec.ops import RelativeBias, embedding_lookup, hstu_attention, norm_gate, sampled_softmax_loss

THREE, WIDE = torch.tensor([0, 1, 1]), torch.zeros(3, 4)
BIAS = ("position_weight", "time_weight", "query_time", "key_time")


def attention(backend: str = "auto", **given: Any) -> Tensor:
    bias = RelativeBias(*(given.pop(name) for name in BIAS))
    return hstu_attention(backend=backend, **{"bias": bias, **given})


# by operator: the function, its float tensors, its index tensors, its other arguments
OPERATORS: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]] = {
    "hstu_attention": (
        attention,
        {name: torch.zeros(3, 2, 4) for name in "qkv"}
        | {"position_weight": torch.zeros(7), "time_weight": torch.zeros(9)},
        {"offsets": torch.tensor([0, 1, 3]), "num_targets": THREE[:2], "query_time": THREE, "key_time": THREE},
        {"max_seq_len": 4},
    ),
    "norm_gate": (
        norm_gate,
        {"x": WIDE, "gate": WIDE, "weight": torch.ones(4), "bias": torch.zeros(4)},
        {"dropout_keys": THREE},
        {"dropout": 0.5},
    ),
    "sampled_softmax_loss": (
        sampled_softmax_loss,
        {"queries": WIDE, "rows": WIDE, "log_q": torch.zeros(3)},
        {"positives": THREE, "negatives": THREE[:, None]},
        {"temperature": 0.1},
    ),
    "embedding_lookup": (embedding_lookup, {"table": WIDE}, {"ids": THREE}, {}),
}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def each_argument(kind: int) -> pytest.MarkDecorator:
    cases = [(name, argument) for name, parts in OPERATORS.items() for argument in parts[kind]]
    return pytest.mark.parametrize(("name", "argument"), cases)


def call(name: str, backend: str, change: dict[str, Any]) -> Tensor:
    function, floats, indices, others = OPERATORS[name]
    return function(**{**floats, **indices, **others, **change, "backend": backend})


def assert_refused(name: str, error: type[Exception], text: str, change: dict[str, Any]) -> None:
    for backend in ("auto", *backends(name)):
        with pytest.raises(error, match=text) as caught:
            call(name, backend, change)
        assert "\n" not in str(caught.value)


@each_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_arguments_that_are_changed_below_are_right(name: str, dtype: torch.dtype) -> None:
    floats = {argument: tensor.to(dtype) for argument, tensor in OPERATORS[name][1].items()}
    assert call(name, "auto", floats).shape[0] == 3


@each_argument(1)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_what_must_be_float_is_refused_in_another_dtype(name: str, argument: str, dtype: torch.dtype) -> None:
    wrong = OPERATORS[name][1][argument].to(dtype)
    text = f"^{argument} must be float64, float32, bfloat16, float16, got {str(dtype)[6:]}$"
    assert_refused(name, ValueError, text, {argument: wrong})


@each_argument(2)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64, torch.bool])
def test_what_must_be_int64_is_refused_in_another_dtype(name: str, argument: str, dtype: torch.dtype) -> None:
    wrong = OPERATORS[name][2][argument].to(dtype)
    assert_refused(name, ValueError, f"^{argument} must be int64, got {str(dtype)[6:]}$", {argument: wrong})


@each_argument(1)
def test_a_float_tensor_on_another_device_is_refused(name: str, argument: str) -> None:
    first, *_ = OPERATORS[name][1]
    wrong = {argument: OPERATORS[name][1][argument].to("meta")}
    assert_refused(name, ValueError, f"^all tensors must be on one device: {first} is on (cpu|meta), .* on ", wrong)


@each_argument(2)
def test_an_index_on_another_device_is_refused(name: str, argument: str) -> None:
    wrong = {argument: OPERATORS[name][2][argument].to("meta")}
    assert_refused(name, ValueError, f"^all tensors must be on one device: .* is on cpu, {argument} on meta$", wrong)


@pytest.mark.parametrize("kind", [1, 2])
@each_operator
def test_lists_and_arrays_are_no_tensors(name: str, kind: int) -> None:
    for argument, tensor in OPERATORS[name][kind].items():
        assert_refused(name, TypeError, f"^{argument} must be a tensor, got list$", {argument: tensor.tolist()})
        assert_refused(name, TypeError, f"^{argument} must be a tensor, got ndarray$", {argument: tensor.numpy()})


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("hstu_attention", {"q": None}, "^q must be a tensor, got NoneType$"),
        ("hstu_attention", {"offsets": None}, "^offsets must be a tensor, got NoneType$"),
        ("hstu_attention", {"max_seq_len": 2.5}, "^max_seq_len must be an integer, got 2.5$"),
        ("hstu_attention", {"contextual_seq_len": "1"}, "^contextual_seq_len must be an integer, got '1'$"),
        ("hstu_attention", {"alpha": "a"}, "^alpha must be a number, got 'a'$"),
        ("hstu_attention", {"divisor": [4]}, r"^divisor must be a number, got \[4\]$"),
        ("hstu_attention", {"causal": "no"}, "^causal must be True or False, got 'no'$"),
        ("hstu_attention", {"bias": torch.zeros(7)}, "^bias must be a RelativeBias or None, got Tensor$"),
        ("hstu_attention", {"position_weight": None}, "^position_weight must be a tensor, got NoneType$"),
        ("norm_gate", {"gate": None}, "^gate must be a tensor, got NoneType$"),
        ("norm_gate", {"eps": None}, "^eps must be a number, got None$"),
        ("norm_gate", {"dropout": "0.5"}, "^dropout must be a number, got '0.5'$"),
        ("sampled_softmax_loss", {"temperature": None}, "^temperature must be a number, got None$"),
        ("sampled_softmax_loss", {"mask_collisions": 1.0}, "^mask_collisions must be True or False, got 1.0$"),
        ("embedding_lookup", {"optimizer": "sgd"}, "^optimizer must be a RowOptimizer or None, got 'sgd'$"),
        ("embedding_lookup", {"optimizer": torch.optim.SGD}, "^optimizer must be a RowOptimizer or None"),
    ],
)
def test_other_types_raise_type_error(name: str, change: dict[str, Any], text: str) -> None:
    assert_refused(name, TypeError, text, change)


@each_operator
@pytest.mark.parametrize("backend", [None, 3])
def test_a_backend_that_is_no_string_raises_type_error(name: str, backend: Any) -> None:
    with pytest.raises(TypeError, match=f"^backend must be a string, got {backend}$"):
        call(name, backend, {})


def test_numbers_of_numpy_are_numbers() -> None:
    sizes = {"max_seq_len": np.int64(4), "max_attn_len": np.int32(2)}
    plain = call("hstu_attention", "auto", {"max_seq_len": 4, "max_attn_len": 2, "alpha": 0.5})
    assert torch.equal(call("hstu_attention", "auto", {**sizes, "alpha": np.float32(0.5)}), plain)
    assert call("norm_gate", "auto", {"eps": np.float64(1e-3)}).shape == (3, 4)
