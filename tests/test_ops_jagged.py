"""Jagged helpers against plain loops over lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    examples,
    lengths,
    one_thread,  # noqa: F401
)
from torch import Tensor

from npu_rec.ops.jagged import (
    concat_jagged,
    jagged_to_padded,
    last_k,
    lengths_to_offsets,
    offsets_to_lengths,
    padded_to_jagged,
    position_of_token,
    sequence_of_token,
    split_jagged,
)

SHAPES = st.sampled_from([(), (3,), (2, 3)])


def offsets_of(sizes: tuple[int, ...] | list[int]) -> Tensor:
    return lengths_to_offsets(torch.tensor(sizes, dtype=torch.int64))


def values_of(total: int, shape: tuple[int, ...], start: int = 1) -> Tensor:
    """All different, none zero."""
    count = total * int(torch.tensor(shape).prod()) if shape else total
    return (torch.arange(count) + start).view(total, *shape)


def cut(values: Tensor, sizes: tuple[int, ...] | list[int]) -> list[Tensor]:
    """The sequences, one by one."""
    starts = [sum(sizes[:b]) for b in range(len(sizes))]
    return [values[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def glue(sequences: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like[:0], *sequences])


@examples(50)
@given(lengths(20))
def test_offsets_are_running_sums_and_lengths_their_differences(sizes: tuple[int, ...]) -> None:
    offsets = offsets_of(sizes)
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [sum(sizes[:b]) for b in range(len(sizes) + 1)]
    assert offsets_to_lengths(offsets).tolist() == list(sizes)
    assert torch.equal(lengths_to_offsets(torch.tensor(sizes, dtype=torch.int32)), offsets)


@examples(50)
@given(lengths(20))
def test_each_token_knows_its_sequence_and_its_place(sizes: tuple[int, ...]) -> None:
    offsets, total = offsets_of(sizes), sum(sizes)
    assert sequence_of_token(offsets, total).tolist() == [b for b, n in enumerate(sizes) for _ in range(n)]
    assert position_of_token(offsets, total).tolist() == [p for n in sizes for p in range(n)]


@examples(80)
@given(lengths(20), SHAPES, st.integers(0, 25), st.sampled_from([0, -7]))
def test_padding_fills_gaps_and_cuts_what_is_too_long(
    sizes: tuple[int, ...], shape: tuple[int, ...], max_len: int, fill: int
) -> None:
    values = values_of(sum(sizes), shape)
    padded = jagged_to_padded(values, offsets_of(sizes), max_len, fill)
    assert padded.shape == (len(sizes), max_len, *shape)
    assert padded.dtype == values.dtype
    for row, sequence in zip(padded, cut(values, sizes), strict=True):
        kept = min(max_len, len(sequence))
        assert torch.equal(row[:kept], sequence[:kept])
        assert bool((row[kept:] == fill).all())


@examples(80)
@given(lengths(20), SHAPES, st.integers(0, 3))
def test_padded_to_jagged_undoes_jagged_to_padded(sizes: tuple[int, ...], shape: tuple[int, ...], more: int) -> None:
    values, offsets = values_of(sum(sizes), shape), offsets_of(sizes)
    padded = jagged_to_padded(values, offsets, max(sizes, default=0) + more)
    assert torch.equal(padded_to_jagged(padded, offsets), values)


@examples(80)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5), SHAPES)
def test_concatenation_appends_sequence_by_sequence(pairs: list[tuple[int, int]], shape: tuple[int, ...]) -> None:
    left_sizes, right_sizes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    left, right = values_of(sum(left_sizes), shape), values_of(sum(right_sizes), shape, start=10_000)
    values, offsets = concat_jagged(left, offsets_of(left_sizes), right, offsets_of(right_sizes))
    sequences = [x for both in zip(cut(left, left_sizes), cut(right, right_sizes), strict=True) for x in both]
    assert torch.equal(values, glue(sequences, left))
    assert offsets_to_lengths(offsets).tolist() == [a + b for a, b in pairs]


@examples(80)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=5), SHAPES)
def test_split_cuts_after_the_given_lengths_or_at_the_end(pairs: list[tuple[int, int]], shape: tuple[int, ...]) -> None:
    sizes, wanted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    values = values_of(sum(sizes), shape)
    left, left_offsets, right, right_offsets = split_jagged(
        values, offsets_of(sizes), torch.tensor(wanted, dtype=torch.int64)
    )
    sequences = cut(values, sizes)
    assert torch.equal(left, glue([x[:k] for x, k in zip(sequences, wanted, strict=True)], values))
    assert torch.equal(right, glue([x[k:] for x, k in zip(sequences, wanted, strict=True)], values))
    assert offsets_to_lengths(left_offsets).tolist() == [min(n, k) for n, k in pairs]
    assert offsets_to_lengths(right_offsets).tolist() == [max(n - k, 0) for n, k in pairs]
    back, offsets = concat_jagged(left, left_offsets, right, right_offsets)
    assert torch.equal(back, values)
    assert torch.equal(offsets, offsets_of(sizes))


@examples(80)
@given(lengths(20), SHAPES, st.integers(0, 25))
def test_last_k_keeps_the_end_of_each_sequence(sizes: tuple[int, ...], shape: tuple[int, ...], k: int) -> None:
    values = values_of(sum(sizes), shape)
    kept, offsets = last_k(values, offsets_of(sizes), k)
    assert torch.equal(kept, glue([x[max(len(x) - k, 0) :] for x in cut(values, sizes)], values))
    assert offsets_to_lengths(offsets).tolist() == [min(n, k) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    values, offsets = torch.ones(3, dtype=dtype), offsets_of([2, 0, 1])
    padded = jagged_to_padded(values, offsets, 2)
    both, _ = concat_jagged(values, offsets, values, offsets)
    left, _, right, _ = split_jagged(values, offsets, torch.tensor([1, 1, 1]))
    assert {x.dtype for x in (padded, padded_to_jagged(padded, offsets), both, left, right)} == {dtype}


def test_gradients_flow_through_to_the_token_they_belong_to() -> None:
    values, offsets = torch.ones(5, 2, dtype=torch.float64, requires_grad=True), offsets_of([3, 0, 2])
    other = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)

    def through_everything(x: Tensor, y: Tensor) -> Tensor:
        both, both_offsets = concat_jagged(x, offsets, y, offsets_of([0, 1, 0]))
        padded = jagged_to_padded(both, both_offsets, 3)
        kept, _ = last_k(padded_to_jagged(padded, both_offsets), both_offsets, 2)
        return kept

    assert torch.autograd.gradcheck(through_everything, (values, other))
    (grad,) = torch.autograd.grad(through_everything(values, other).sum(), values)
    assert grad[:, 0].tolist() == [0, 1, 1, 1, 1]  # the first of three is not among the last two
