"""`linear_silu`: bit-equal to PyTorch's own functions, autocast, torch.compile, and a stand-in for RecSDK."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import vendor_standins_small as vendor
from strategies import (
    assert_all_close,
    forward_and_gradients,
    generator,
    max_error,
    normal,
    one_thread,  # noqa: F401
)
from torch import Tensor
from torch.nn.functional import linear, silu
from vendor_standins import registered

from npu_rec.ops import OPERATORS, linear_silu
from npu_rec.ops.linear_silu_reference import LinearSiluRequest

SPLITS = (16, 48, 32, 32)
BACKEND = OPERATORS["linear_silu"].find("vendor")


def leaves(bias: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    seed = generator(2)
    found = {"x": normal(seed, 7, 32), "weight": normal(seed, 128, 32, scale=0.2)}
    return {name: x.to(dtype) for name, x in (found | ({"bias": normal(seed, 128)} if bias else {})).items()}


def weighed(parts: tuple[Tensor, ...]) -> Tensor:
    """One number from all parts, each weighed differently."""
    return torch.stack([(part * (i + 1)).cos().sum() for i, part in enumerate(parts)]).sum()


def plain(**given: Tensor) -> Tensor:
    return weighed(torch.split(silu(linear(**{"input" if k == "x" else k: v for k, v in given.items()})), SPLITS, 1))


def operator(backend: str, **given: Tensor) -> Tensor:
    return weighed(linear_silu(**given, splits=SPLITS, backend=backend))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_is_pytorchs_own_functions_bit_by_bit(bias: bool, backend: str, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = forward_and_gradients(lambda **x: operator(backend, **x), leaves(bias), 0)
        expected = forward_and_gradients(plain, leaves(bias), 0)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_the_formula_in_float64_and_gradcheck() -> None:
    given = {name: leaf.double() for name, leaf in leaves(True).items()}
    u, v, q, k = linear_silu(**given, splits=SPLITS)
    product = given["x"] @ given["weight"].t() + given["bias"]
    torch.testing.assert_close(torch.cat([u, v, q, k], 1), product / (1.0 + (-product).exp()))
    assert [part.shape[1] for part in (u, v, q, k)] == list(SPLITS)
    small = [x.requires_grad_() for x in (torch.randn(2, 3).double(), torch.randn(8, 3).double())]
    assert torch.autograd.gradcheck(lambda *x: linear_silu(*x, splits=(2, 2, 2, 2)), small)


def test_compiled_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, weight: operator("auto", x=x, weight=weight), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(**leaves()), plain(**leaves()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vendor_operator_errs_no_more_than_plain_pytorch(bias: bool, dtype: torch.dtype) -> None:
    given = leaves(bias, dtype)
    exact = forward_and_gradients(plain, {name: leaf.double() for name, leaf in given.items()}, 0)
    with registered(*vendor.LINEAR_SILU):
        actual = forward_and_gradients(lambda **x: operator("vendor", **x), given, 0)
    allowed = max_error(forward_and_gradients(plain, given, 0), exact)
    for name, error in max_error(actual, exact).items():
        assert error <= 2 * allowed[name] + 1e-6, name


def test_under_autocast_the_vendor_operator_computes_in_its_dtype() -> None:
    given = leaves()
    with registered(*vendor.LINEAR_SILU), torch.autocast("cpu", torch.bfloat16):
        parts = linear_silu(**given, splits=SPLITS)
        assert {part.dtype for part in parts} == {torch.bfloat16}
        actual = forward_and_gradients(lambda **x: operator("vendor", **x), given, 0)
        expected = forward_and_gradients(plain, given, 0)
    assert_all_close(actual, expected, 0.02)


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("bias", [False, True])
def test_schemas_and_fake_kernels(backend: str, bias: bool) -> None:
    dtype = torch.float32 if backend == "reference" else torch.bfloat16
    given = leaves(bias, dtype)
    arguments = (given["x"], given["weight"], given.get("bias"), list(SPLITS), backend)
    with registered(*vendor.LINEAR_SILU):
        torch.library.opcheck(torch.ops.npu_rec.linear_silu.default, arguments)
        *parts, product = torch.ops.npu_rec.linear_silu(*arguments)
        backward = (*(torch.ones_like(part) for part in parts), product, *arguments)
        torch.library.opcheck(torch.ops.npu_rec.linear_silu_backward.default, backward)


def test_the_registered_reference_has_the_gradients_of_the_composed_one() -> None:
    given = leaves(True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weighed(torch.ops.npu_rec.linear_silu(x, weight, bias, list(SPLITS), "reference")[:4])

    assert_all_close(forward_and_gradients(run, given, 0), forward_and_gradients(plain, given, 0), 1e-5)


def request(
    tokens: int = 2, width: int = 16, splits: tuple[int, ...] = (16, 16, 16, 16), dtype: torch.dtype = torch.bfloat16
) -> LinearSiluRequest:
    weight = torch.empty(1, 1).expand(sum(splits), width)
    return LinearSiluRequest(torch.empty(1, 1).expand(tokens, width), weight, None, splits, dtype)


def test_without_the_package_the_reason_names_it() -> None:
    assert BACKEND.supports(request()) == "no mxrec::distance_in_linear_silu: rec_ops is for Ascend NPUs"


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (request(dtype=torch.float32), "computes in float16 and bfloat16, not in torch.float32"),
        (request(tokens=0), "T is 0; 1 to 2147483647"),
        (request(width=8, splits=(8, 8, 8, 8)), "K is 8; 16 to 8192, a multiple of 16"),
        (request(width=8208), "K is 8208; 16 to 8192, a multiple of 16"),
        (request(splits=(16, 16, 24, 8)), "a part is 24; 16 to 8192, a multiple of 16"),
        (request(splits=(8208, 16, 16, 16)), "a part is 8208; 16 to 8192, a multiple of 16"),
        (request(width=32), "N = 64 is not a multiple of 4 K = 128"),
        (request(splits=(16, 16, 32)), "has 4 parts, not 3"),
    ],
)
def test_each_limit(refused: LinearSiluRequest, reason: str) -> None:
    with registered(*vendor.LINEAR_SILU):
        assert BACKEND.supports(refused) == reason
        assert BACKEND.supports(request(width=8192, splits=(8192,) * 4)) is None
        assert BACKEND.supports(dataclasses.replace(request(), dtype=torch.float16)) is None


def test_a_release_without_the_product_among_its_results_is_refused() -> None:
    (schema, function), backward = vendor.LINEAR_SILU
    with registered((schema.replace("-> Tensor[]", "-> (Tensor, Tensor, Tensor, Tensor)"), function), backward):
        assert BACKEND.supports(request()) == (
            "mxrec::distance_in_linear_silu returns something else: another release of rec_ops"
        )


@pytest.mark.parametrize("change", [{"splits": (64, 64)}, {"splits": (1, 1, 1, 1)}, {"weight": torch.zeros(128, 3)}])
def test_wrong_shapes_are_errors(change: dict[str, object]) -> None:
    given: dict[str, object] = {**leaves(), "splits": SPLITS} | change
    with pytest.raises(ValueError, match="must be"):
        linear_silu(**given)  # type: ignore[arg-type]


def test_all_parts_are_differentiable_alone() -> None:
    for chosen, backend in itertools.product(range(4), ("reference", "vendor")):
        given = {name: leaf.requires_grad_() for name, leaf in leaves(dtype=torch.bfloat16).items()}
        with registered(*vendor.LINEAR_SILU):
            linear_silu(**given, splits=SPLITS, backend=backend)[chosen].sum().backward()
        weight = given["weight"].grad
        assert weight is not None
        rows = slice(sum(SPLITS[:chosen]), sum(SPLITS[: chosen + 1]))
        assert weight[rows].any()
        assert not weight[: rows.start].any()
        assert not weight[rows.stop :].any()


@pytest.mark.parametrize(
    ("x_dtype", "splits", "message"),
    [
        (torch.float32, (9, -1, 0, 0), "splits must be four widths"),
        (torch.float64, (2, 2, 2, 2), "x and weight must have one dtype"),
    ],
)
def test_widths_below_zero_and_two_dtypes_are_refused(
    x_dtype: torch.dtype, splits: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_silu(torch.zeros(3, 4, dtype=x_dtype), torch.zeros(8, 4), splits=splits)
