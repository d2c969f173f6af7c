"""Counter-based random numbers: pinned values, uniformity, and independence of how work is laid out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    examples,
    one_thread,  # noqa: F401
)
from torch import Tensor

from npu_rec.ops.compiled import extension, unusable
from npu_rec.ops.random import (
    dropout,
    dropout_scale,
    plain_random_integers,
    random_bits,
    random_integers,
    random_key,
    random_truncated_normal,
    random_uniform,
)

PURPOSES = ("dropout", "negatives", "rows", "shuffle", "data")
INT64 = st.integers(-(2**63), 2**63 - 1)


def keys_of(count: int, seed: int = 0, purpose: str = "dropout") -> Tensor:
    return random_key(seed, purpose, torch.arange(count))


# --- the same in Python integers, from the definitions of splitmix64 and of MurmurHash3's finaliser

MASK32, MASK64 = 2**32 - 1, 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The output for a state that has been advanced already."""
    z = state & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def fmix32(h: int) -> int:
    h &= MASK32
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK32
    return h ^ (h >> 16)


def key_by_integers(seed: int, purpose: str, *parts: int) -> int:
    key = splitmix64(splitmix64(seed + GAMMA) + (1 + PURPOSES.index(purpose)) * GAMMA)
    for part in parts:
        key = splitmix64(key + (part + 1) * GAMMA)
    return key - 2**64 if key >> 63 else key


def bits_by_integers(key: int, count: int) -> list[int]:
    """Unsigned."""
    low, high = key & MASK32, (key >> 32) & MASK32
    return [fmix32(fmix32(i * 0x9E3779B9 + low) ^ high) for i in range(count)]


def test_splitmix64_is_the_published_generator() -> None:
    assert [splitmix64((i + 1) * GAMMA) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@examples(100)
@given(INT64, st.sampled_from(PURPOSES), st.lists(INT64, max_size=3), INT64, st.lists(INT64, max_size=3))
def test_keys_equal_their_definition(seed: int, purpose: str, before: list[int], part: int, after: list[int]) -> None:
    expected = key_by_integers(seed, purpose, *before, part, *after)
    assert random_key(seed, purpose, *before, torch.tensor([part]), *after).tolist() == [expected]
    tensors = [torch.tensor(p) for p in (*before, part, *after)]
    assert random_key(seed, purpose, *tensors).tolist() == expected


@examples(100)
@given(INT64, st.integers(0, 40))
def test_bits_equal_their_definition(key: int, count: int) -> None:
    bits = random_bits(torch.tensor([key]), count)
    assert bits.dtype == torch.int32
    assert [b & MASK32 for b in bits[0].tolist()] == bits_by_integers(key, count)


@examples(60)
@given(INT64, st.sampled_from([1, 2, 3, 1000, 3706, 2**31 - 1]) | st.integers(1, 2**31 - 1))
def test_integers_are_the_high_word_of_a_product(key: int, high: int) -> None:
    expected = [(b * high) >> 32 for b in bits_by_integers(key, 5)]
    assert random_integers(torch.tensor([key]), 5, high).tolist() == [expected]


# --- pinned: checkpoints, runs and other backends rely on these numbers

KEYS = (0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789)


GOLDEN_KEYS = {
    "data": [4377630525232948520, -8444896707309948438],
    "dropout": [3378800065982618103, -7633033710440111678],
    "negatives": [-5444843608528631761, 5654283466292565475],
    "rows": [7282186609204035994, 14429521472944656],
    "shuffle": [-5673672884067526930, -6771626916069675328],
}
GOLDEN_BITS = [
    [0, -1438753951, -1723850836, -1655754064],
    [804215951, 1895220952, -1139454994, -1363543387],
    [-835893607, 836817700, -133212378, 359926651],
    [-1837252587, 861737789, -686329870, 1735222046],
    [1832674720, 295973983, 1217018882, -1102309593],
    [-2093568570, -160112839, -320156638, -1094225833],
]
GOLDEN_UNIFORM = [
    [1, 11157083, 10043423],
    [3141469, 7403207, 12326219],
    [13512007, 3268819, 16256855],
    [9600449, 3366163, 14096239],
    [7158885, 1156149, 4753981],
    [8599213, 16151775, 15526605],
]
GOLDEN_INTEGERS = [
    [0, 2464, 2218, 2277],
    [693, 1635, 2722, 2529],
    [2984, 722, 3591, 310],
    [2120, 743, 3113, 1497],
    [1581, 255, 1050, 2754],
    [1899, 3567, 3429, 2761],
]
GOLDEN_NORMAL = [
    [-0.039999973, 0.00811330881, 0.0047645024],
    [-0.0167271756, -0.00281984871, 0.0118965721],
    [0.0162315946, -0.0162172839, 0.03244875],
    [0.00347376685, -0.0158345383, 0.0186702311],
    [-0.0035255563, -0.0269976929, -0.0108802421],
    [0.000600772153, 0.0313784257, 0.0263422225],
]
GOLDEN_KEPT = [
    [0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1],
    [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0],
    [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1],
    [0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1],
]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_keys_are_pinned(purpose: str) -> None:
    keys = random_key(42, purpose, 3, torch.tensor([0, 7]), torch.tensor([11, 2**40]))
    assert keys.tolist() == GOLDEN_KEYS[purpose]


def test_draws_are_pinned() -> None:
    keys = torch.tensor(KEYS)
    assert random_bits(keys, 4).tolist() == GOLDEN_BITS
    assert (random_uniform(keys, 3) * 2**24).tolist() == GOLDEN_UNIFORM  # odd numbers
    assert random_integers(keys, 4, 3706).tolist() == GOLDEN_INTEGERS
    assert plain_random_integers(keys, 4, 3706).tolist() == GOLDEN_INTEGERS
    assert (dropout_scale(keys, 12, 0.2) > 0).int().tolist() == GOLDEN_KEPT
    # the inverse error function may round otherwise elsewhere
    torch.testing.assert_close(
        random_truncated_normal(keys, 3, 0.02), torch.tensor(GOLDEN_NORMAL), rtol=1e-5, atol=1e-8
    )


# --- distribution


def chi_square(cells: Tensor, kinds: int) -> float:
    """How many deviations the statistic of `cells` (values 0..kinds-1) lies above its mean."""
    counts = torch.bincount(cells.flatten(), minlength=kinds).double()
    expected = cells.numel() / kinds
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - (kinds - 1)) / math.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize(
    "keys",
    [keys_of(2000), torch.arange(2000), torch.arange(2000) << 32, -torch.arange(2000)],
    ids=["keys", "small numbers", "high words", "negative numbers"],
)
def test_draws_are_uniform_over_keys_over_indices_and_in_pairs(keys: Tensor) -> None:
    cells = (random_uniform(keys, 100) * 64).to(torch.int64)
    assert chi_square(cells, 64) < 5
    assert max(chi_square(cells[:, i], 64) for i in range(100)) < 6  # a fixed index, over keys
    long = (random_uniform(keys[:4], 50_000) * 64).to(torch.int64)
    assert max(chi_square(row, 64) for row in long) < 5  # a fixed key, over indices
    assert chi_square(cells[:, :-1] * 64 + cells[:, 1:], 4096) < 5  # neighbours of one key
    assert chi_square(cells[:-1] * 64 + cells[1:], 4096) < 5  # neighbouring keys


def test_each_bit_is_set_half_of_the_time() -> None:
    bits = random_bits(keys_of(2000), 50)
    share = torch.stack([((bits >> b) & 1).double().mean() for b in range(32)])
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(bits.numel())


@pytest.mark.parametrize("high", [1, 2, 3, 10, 97])
def test_integers_are_uniform_and_reach_every_value(high: int) -> None:
    drawn = random_integers(keys_of(1000), 100, high)
    assert drawn.dtype == torch.int64
    assert (int(drawn.min()), int(drawn.max())) == (0, high - 1)
    if high > 1:
        assert chi_square(drawn, high) < 5


def test_uniform_numbers_lie_strictly_between_zero_and_one() -> None:
    drawn = random_uniform(keys_of(2000), 500)
    assert drawn.dtype == torch.float32
    assert 0 < float(drawn.min()) < 1e-5
    assert 1 - 1e-5 < float(drawn.max()) < 1
    assert abs(float(drawn.double().mean()) - 0.5) < 5 / math.sqrt(12 * drawn.numel())


def unmix32(h: int) -> int:
    """The inverse of `fmix32`."""
    h ^= h >> 16
    h = (h * pow(0xC2B2AE35, -1, 2**32)) & MASK32
    h ^= (h >> 13) ^ (h >> 26)
    h = (h * pow(0x85EBCA6B, -1, 2**32)) & MASK32
    return h ^ (h >> 16)


@pytest.mark.parametrize(("bits", "uniform"), [(0, 2**-24), (MASK32, 1 - 2**-24), (2**31, 0.5 + 2**-24)])
def test_extreme_bits_give_numbers_inside_their_range(bits: int, uniform: float) -> None:
    assert fmix32(unmix32(bits)) == bits
    keys = torch.tensor([unmix32(bits)]) << 32  # with low word 0, whose hash is 0, the high word alone counts
    assert bits_by_integers(int(keys), 1) == [bits]
    assert random_uniform(keys, 1).item() == uniform
    assert random_integers(keys, 1, 2**31 - 1).item() == bits * (2**31 - 1) >> 32
    assert abs(random_truncated_normal(keys, 1, 1.0).item()) <= 2.00001


def test_truncated_normal_has_its_deviation_and_its_cut() -> None:
    drawn = random_truncated_normal(keys_of(2000), 100, 0.02).double()
    assert float(drawn.abs().max()) <= 0.02 * 2 * (1 + 1e-5)
    cut = 0.02 * 0.8796256610342398  # of a standard normal cut at two deviations
    assert abs(float(drawn.mean())) < 5 * cut / math.sqrt(drawn.numel())
    assert abs(float(drawn.std()) / cut - 1) < 0.01
    inside = float((drawn.abs() < 0.02).double().mean())
    assert abs(inside - 0.6826894921 / 0.9544997361) < 0.005


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_dropout_scale_drops_its_share_and_has_mean_one(probability: float) -> None:
    scale = dropout_scale(keys_of(2000), 100, probability).double()
    deviation = math.sqrt(probability * (1 - probability) / scale.numel())
    assert abs(float((scale == 0).double().mean()) - probability) <= 5 * deviation
    assert abs(float(scale.mean()) - 1) <= 5 * deviation / (1 - probability) + 1e-6
    assert set(scale.unique().tolist()) <= {0.0, float(torch.tensor(1 / (1 - probability)))}


# --- keys


def test_keys_differ_by_seed_purpose_part_and_order() -> None:
    parts = torch.tensor(0)
    variants = [
        *(random_key(0, purpose, parts) for purpose in PURPOSES),
        *(random_key(seed, "dropout", parts) for seed in (-1, 1, 2, 2**32)),
        *(random_key(0, "dropout", torch.tensor(part)) for part in (-1, 1, 2, 2**32)),
        random_key(0, "dropout", 0, parts),
        random_key(0, "dropout", 0, 0, parts),
        random_key(0, "dropout", 1, torch.tensor(2)),
        random_key(0, "dropout", 2, torch.tensor(1)),
    ]
    keys = [int(key) for key in variants]
    assert len(set(keys)) == len(keys)


def test_draws_of_different_purposes_are_unrelated() -> None:
    draws = [random_uniform(keys_of(1000, purpose=purpose), 50).flatten() for purpose in PURPOSES]
    correlation = torch.corrcoef(torch.stack(draws))
    assert float((correlation - torch.eye(len(PURPOSES))).abs().max()) < 5 / math.sqrt(50_000)


def test_a_million_keys_are_all_different() -> None:
    keys = random_key(0, "negatives", 1, torch.arange(1000)[:, None], torch.arange(1000)[None, :])
    assert keys.shape == (1000, 1000)
    assert keys.unique().numel() == 1_000_000


def test_keys_without_a_tensor_among_their_parts_raise_type_error() -> None:
    with pytest.raises(TypeError, match="needs a tensor among its parts"):
        random_key(0, "dropout", 1, 2)


def test_an_unknown_purpose_raises_key_error() -> None:
    with pytest.raises(KeyError, match="lottery"):
        random_key(0, "lottery", torch.tensor(0))


@pytest.mark.parametrize("high", [2**31, 8 * 10**9, 2**61 - 1])
def test_integers_of_a_large_range_are_spread_over_all_of_it(high: int) -> None:
    drawn = random_integers(keys_of(2000), 10, high)
    assert drawn.dtype == torch.int64
    assert 0 <= int(drawn.min()) < high / 500
    assert high * (1 - 1 / 500) < int(drawn.max()) < high
    assert abs(float(drawn.double().mean()) / high - 0.5) < 0.01
    assert len(drawn.unique()) > 0.999 * drawn.numel()
    assert torch.equal(random_integers(keys_of(2000), 3, high), drawn[:, :3])


@pytest.mark.parametrize("high", [0, -1, 2**61])
def test_a_range_that_cannot_be_drawn_from_raises_value_error(high: int) -> None:
    with pytest.raises(ValueError, match=f"high must be in 1..2.61 - 1, got {high}"):
        random_integers(torch.tensor([0]), 1, high)


# --- layout


@examples(30)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 1000))
def test_draws_do_not_depend_on_batch_order_shape_or_ranks(tokens: int, ranks: int, seed: int) -> None:
    sequences, positions = torch.arange(tokens) // 7, torch.arange(tokens) % 7
    keys = random_key(seed, "negatives", 2, sequences, positions)
    together = random_integers(keys, 9, 1000)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(random_key(seed, "negatives", 2, sequences[order], positions[order]), keys[order])
    assert torch.equal(random_integers(keys[order], 9, 1000), together[order])
    for rank in range(ranks):
        share = random_key(seed, "negatives", 2, sequences[rank::ranks], positions[rank::ranks])
        assert torch.equal(random_integers(share, 9, 1000), together[rank::ranks])
    grid = random_key(seed, "negatives", 2, torch.arange(tokens // 7 + 1)[:, None], torch.arange(7))
    assert torch.equal(random_integers(grid, 9, 1000)[sequences, positions], together)
    assert random_integers(keys.view(1, tokens, 1), 9, 1000).shape == (1, tokens, 1, 9)


def test_the_first_draws_do_not_depend_on_how_many_are_made() -> None:
    keys = keys_of(20)
    assert torch.equal(random_bits(keys, 100)[:, :7], random_bits(keys, 7))
    assert random_bits(keys, 0).shape == (20, 0)
    assert random_bits(keys[:0], 7).shape == (0, 7)


def test_dropout_follows_the_token_and_is_off_without_keys() -> None:
    x, keys = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), keys_of(30)
    dropped = dropout(x, 0.5, keys)
    assert torch.equal(dropped, x * dropout_scale(keys, 8, 0.5))
    assert torch.equal(dropout(x.flip(0), 0.5, keys.flip(0)), dropped.flip(0))
    assert dropout(x.bfloat16(), 0.5, keys).dtype == torch.bfloat16
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, keys) is x


@pytest.mark.skipif(unusable() is not None, reason=str(unusable()))
@pytest.mark.parametrize("isa", [] if unusable() is not None else extension().instruction_sets())
@pytest.mark.parametrize("count", [0, 1, 7, 16, 37, 128])
def test_compiled_integers_are_the_plain_ones(isa: str, count: int) -> None:
    keys = keys_of(60).view(3, 20)
    keys[0, :4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    for some in (keys, keys.t(), keys[:0], keys[0, 0]):
        for high in (1, 3706, 2**31 - 1):
            found = extension().random_integers(some, count, high, isa)
            assert torch.equal(found, plain_random_integers(some, count, high))
