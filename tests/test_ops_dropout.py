"""`dropout`: every backend gives the bits of the formula, which follow the keys alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Place,
    backends,
    examples,
    generator,
    known_backends,
    normal,
    one_thread,  # noqa: F401
    opcheck,
    place_of,
)
from torch import Tensor

from npu_rec.errors import BackendError
from npu_rec.ops import dropout
from npu_rec.ops.random import dropout_scale, random_key

ALL = backends("dropout")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def keys_of(count: int, seed: int = 0) -> Tensor:
    return random_key(seed, "dropout", torch.arange(count))


def place_for(backend: str) -> Place:
    return place_of(
        lambda device, dtype: dropout(
            torch.zeros(2, 3, device=device, dtype=dtype), 0.5, keys_of(2).to(device), backend=backend
        )
    )


def dropped(x: Tensor, probability: float, keys: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The output and the gradient of x."""
    x = x.detach().requires_grad_()
    out = dropout(x, probability, keys, backend=backend)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradient_have_the_bits_of_the_product(backend: str, dtype: torch.dtype) -> None:
    device = place_for(backend).device
    probabilities = st.floats(0.0, 1.0, exclude_max=True) | st.sampled_from([1e-9, 0.2, 0.5, 1 - 2**-30, 1 - 2**-40])

    @examples(60)
    @given(st.integers(0, 40), st.integers(1, 70), probabilities, st.integers(0, 1000))
    def check(tokens: int, width: int, probability: float, seed: int) -> None:
        x, grad = normal(generator(seed), 2, tokens, width).to(dtype)
        keys = keys_of(tokens, seed)
        scale = dropout_scale(keys, width, probability).to(dtype) if probability else torch.ones((), dtype=dtype)
        given = (x.to(device), probability, keys.to(device), grad.to(device))
        try:
            results = dropped(*given, backend)
        except BackendError as error:
            pytest.skip(str(error))
        for result, expected in zip(results, (x * scale, grad * scale), strict=True):
            assert result.dtype == dtype
            torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)

    check()


@pytest.mark.parametrize("backend", ALL)
def test_rows_and_gradients_may_lie_apart(backend: str) -> None:
    place = place_for(backend)
    wide, keys = normal(generator(0), 9, 50).to(place.device, place.dtype), keys_of(9).to(place.device)
    scale = dropout_scale(keys, 7, 0.4).to(place.dtype)
    for x, grad in ((wide[:, 3:10], wide[:, :14:2]), (wide[:, ::7][:, :7], wide[:, :1].expand(9, 7))):
        out, dx = dropped(x, 0.4, keys, grad, backend)
        assert torch.equal(out, x * scale)
        assert torch.equal(dx, grad * scale)


@pytest.mark.parametrize("backend", ALL)
def test_schemas_and_fake_kernels(backend: str) -> None:
    place = place_for(backend)
    x, keys = normal(generator(4), 3, 8).to(place.device, place.dtype), keys_of(3).to(place.device)
    opcheck("dropout", backend, (x.requires_grad_(), keys, 0.3, backend))
    opcheck("dropout_backward", backend, (x.detach(), keys, 0.3, backend))


def test_nothing_is_dropped_without_keys_or_with_probability_zero() -> None:
    x = torch.ones(3, 8)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, keys_of(3)) is x


def test_it_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        x, keys = normal(generator(tokens), tokens, 6), keys_of(tokens)
        assert torch.equal(compiled(x, 0.3, keys), dropout(x, 0.3, keys))


def test_arguments_are_checked() -> None:
    x, keys = torch.zeros(2, 3), keys_of(2)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\), got 1.0"):
        dropout(x, 1.0, keys)
    with pytest.raises(ValueError, match=r"x must be \[T, C\] and keys \[T\], got \[2, 3\], \[1\]"):
        dropout(x, 0.5, keys[:1])
    with pytest.raises(ValueError, match=r"got \[3\], None"):
        dropout(x[0], 0.5, None)
    with pytest.raises(ValueError, match="keys must be int64"):
        dropout(x, 0.5, keys.int())
    with pytest.raises(TypeError, match="x must be a tensor"):
        dropout([1.0], 0.5, keys)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=f"no backend 'fast'; known: {known_backends('dropout')}"):
        dropout(x, 0.5, keys, backend="fast")
