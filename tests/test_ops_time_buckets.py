"""Time buckets: published values, the fast path against the table, the table against the formula in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    examples,
    one_thread,  # noqa: F401
)
from torch import Tensor

from npu_rec.ops.time_buckets import bucket_edges, time_bucket, time_bucket_reference

SIZES = (1, 2, 7, 60, 128, 144)
EDGES = bucket_edges(128)[1:-1]
EXPECTED = {
    0: 0,
    1: 0,
    2: 2,
    10: 7,
    60: 13,
    3_600: 27,
    86_400: 37,
    604_800: 44,
    2_592_000: 49,
    31_536_000: 57,
    94_608_000: 61,
}


def near_edges(reach: int, below: int = 2**62) -> Tensor:
    """All seconds at most `reach` away from an edge that lies under `below`."""
    edges = torch.tensor([edge for edge in EDGES if edge < below])
    return (edges[:, None] + torch.arange(-reach, reach + 1)).flatten().clamp_min(0)


def formula(seconds: Tensor, buckets: int) -> Tensor:
    """As in Meta's code, evaluated by PyTorch: the logarithm of an integer tensor is float32."""
    return (torch.log(torch.abs(seconds).clamp(min=1)) / 0.301).long().clamp(0, buckets)


@pytest.mark.parametrize("bucket", [time_bucket, time_bucket_reference])
def test_seconds_of_a_minute_an_hour_a_day_a_year_fall_where_published(bucket: object) -> None:
    seconds = torch.tensor(list(EXPECTED))
    assert bucket(seconds, 128).tolist() == list(EXPECTED.values())
    assert bucket(-seconds, 128).tolist() == list(EXPECTED.values())
    assert bucket(seconds, 40).tolist() == [min(b, 40) for b in EXPECTED.values()]


@pytest.mark.parametrize("buckets", SIZES)
def test_fast_path_equals_the_table_near_every_edge(buckets: int) -> None:
    seconds = near_edges(2)
    for delta in (seconds, -seconds):
        assert torch.equal(time_bucket(delta, buckets), time_bucket_reference(delta, buckets))
    for edge in bucket_edges(buckets)[1:-1]:  # and for each alone: vectors and single numbers take other code
        for delta in (edge - 1, edge):
            one = torch.tensor(delta)
            assert int(time_bucket(one, buckets)) == int(time_bucket_reference(one, buckets))


@examples(150)
@given(st.lists(st.integers(0, 62).flatmap(lambda bits: st.integers(-(2**bits), 2**bits)), max_size=40))
def test_fast_path_equals_the_table_everywhere(seconds: list[int]) -> None:
    delta = torch.tensor(seconds, dtype=torch.int64)
    for buckets in SIZES:
        assert torch.equal(time_bucket(delta, buckets), time_bucket_reference(delta, buckets))


def test_fast_path_equals_the_table_on_a_million_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = (torch.rand(1_000_000, generator=generator, dtype=torch.float64) * 22).exp().to(torch.int64)
    assert torch.equal(time_bucket(delta, 128), time_bucket_reference(delta, 128))


@pytest.mark.parametrize("buckets", SIZES)
def test_buckets_rise_from_zero_to_the_last(buckets: int) -> None:
    edges = bucket_edges(buckets)
    assert len(edges) == buckets + 2
    assert list(edges) == sorted(edges)
    counts = time_bucket_reference(near_edges(0), buckets)
    assert counts.tolist() == sorted(counts.tolist())
    assert int(time_bucket(torch.tensor(2**62), buckets)) == min(buckets, math.trunc(62 * math.log(2) / 0.301))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_any_shape_is_kept(shape: tuple[int, ...]) -> None:
    delta = torch.full(shape, -60)
    for bucket in (time_bucket, time_bucket_reference):
        out = bucket(delta, 128)
        assert (out.shape, out.dtype) == (delta.shape, torch.int64)
        assert bool((out == 13).all())
    assert bool((delta == -60).all())  # the argument is not changed


def test_table_is_the_formula_with_correctly_rounded_float32_operations() -> None:
    for seconds in near_edges(2).unique().tolist():
        as_float = float(np.float32(max(seconds, 1)))
        bucket = int(np.float32(math.log(as_float)) / np.float32(0.301))
        assert int(time_bucket_reference(torch.tensor(seconds), 128)) == min(bucket, 128), seconds


def test_table_is_the_formula_as_pytorch_evaluates_it_up_to_a_float32_step_at_an_edge() -> None:
    """PyTorch's vectorised float32 logarithm may err by one unit in the last place, and its library differs by CPU.

    So at an edge the formula itself is a matter of hardware. Where it disagrees with the table, the seconds
    must be, in float32, the edge or its neighbour; and the buckets must be neighbours.
    """
    seconds = near_edges(40, below=2**31)
    table = time_bucket_reference(seconds, 128)
    for offset in range(4):  # other places in a vector
        other = formula(seconds[offset:], 128)
        differs = (other != table[offset:]).nonzero().flatten() + offset
        for i in differs.tolist():
            exact = int(seconds[i])
            edge = min(EDGES, key=lambda e, exact=exact: abs(e - exact))
            step = float(np.spacing(np.float32(edge)))
            assert abs(float(np.float32(exact)) - float(np.float32(edge))) <= step, exact
            assert abs(int(other[i - offset]) - int(table[i])) == 1, exact


def test_table_is_the_formula_as_pytorch_evaluates_it_away_from_edges() -> None:
    generator = torch.Generator().manual_seed(1)
    seconds = (torch.rand(200_000, generator=generator, dtype=torch.float64) * math.log(2**31)).exp().to(torch.int64)
    nearest = (seconds[:, None] - torch.tensor([e for e in EDGES if e < 2**32])).abs().min(1).values
    seconds = torch.cat([seconds[nearest > 256], torch.arange(4096)])
    assert torch.equal(formula(seconds, 128), time_bucket_reference(seconds, 128))
    assert seconds.numel() > 100_000


@pytest.mark.parametrize("buckets", [0, -1, 145])
def test_a_number_of_buckets_that_cannot_be_raises_value_error(buckets: int) -> None:
    with pytest.raises(ValueError, match=f"buckets must be 1 to 144 .*, got {buckets}"):
        bucket_edges(buckets)
