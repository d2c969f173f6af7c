"""Scaling laws, Approximate Entropy and the Performance Law on planted numbers and oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npu_rec.data.splits import LeaveOneOut
from npu_rec.errors import ConfigError
from npu_rec.scaling.entropy import approximate_entropy, mean_entropy
from npu_rec.scaling.fits import STEEPEST, Array, Form, fit, held_out_largest
from npu_rec.scaling.performance_law import PerformanceLaw, corrected_tokens, fit_performance_law

pytest.importorskip("scipy", reason="scipy is not installed (pip install -e '.[test]')")

JOINT = Form(("parameters", "tokens"))
SIMPLE = Form(("parameters",))
POWER = Form(("compute",), floor=False)
PLANTED = {"E": 1.0, "A:parameters": 30.0, "exponent:parameters": 0.34}
PLANTED |= {"A:tokens": 80.0, "exponent:tokens": 0.28}


def grid() -> dict[str, Array]:
    """10 sizes over three decades of parameters, on 6 of data over three decades."""
    sizes, data = np.meshgrid(np.geomspace(1e3, 1e6, 10), np.geomspace(1e4, 1e7, 6))
    return {"parameters": sizes.ravel(), "tokens": data.ravel()}


def planted(x: dict[str, Array], seed: int, noise: float = 0.01) -> Array:
    law = PLANTED["E"] + sum(PLANTED[f"A:{name}"] / values ** PLANTED[f"exponent:{name}"] for name, values in x.items())
    return np.asarray(law * np.exp(noise * np.random.default_rng(seed).normal(size=len(x["tokens"]))))


def test_joint_law_recovers_planted_exponents() -> None:
    x = grid()
    found = fit(JOINT, x, planted(x, seed=0))
    for name in ("exponent:parameters", "exponent:tokens"):
        assert found.values[name] == pytest.approx(PLANTED[name], rel=0.05)
        low, high = found.interval(name)
        assert low < PLANTED[name] < high
    assert found.values["E"] == pytest.approx(1.0, rel=0.1)


def test_without_noise_the_law_is_found_exactly() -> None:
    x = grid()
    found = fit(JOINT, x, planted(x, seed=0, noise=0.0), samples=2)
    assert found.values == pytest.approx(PLANTED, rel=1e-3)


def test_intervals_cover_the_planted_numbers() -> None:
    x = grid()
    covered = dict.fromkeys(PLANTED, 0)
    close = 0
    for seed in range(100):
        found = fit(JOINT, x, planted(x, seed=1000 + seed), samples=200, seed=seed, starts=2)
        for name, value in PLANTED.items():
            low, high = found.interval(name)
            covered[name] += low <= value <= high
        exponents = [name for name in PLANTED if name.startswith("exponent")]
        close += all(abs(found.values[name] / PLANTED[name] - 1) < 0.05 for name in exponents)
    assert min(covered.values()) >= 90, covered
    assert close >= 95


@pytest.mark.parametrize("form", [SIMPLE, POWER], ids=str)
def test_simple_laws(form: Form) -> None:
    (name,) = form.variables
    x = np.geomspace(1e3, 1e7, 24)
    floor = 0.5 if form.floor else 0.0
    rng = np.random.default_rng(3)
    y = (floor + 12.0 * x**-0.3) * np.exp(0.01 * rng.normal(size=24))
    found = fit(form, {name: x}, y)
    assert found.values[f"exponent:{name}"] == pytest.approx(0.3, rel=0.05)
    low, high = found.band({name: x})
    assert (low <= found.predict({name: x})).all()
    assert (found.predict({name: x}) <= high).all()


def test_the_same_seed_gives_the_same_interval() -> None:
    x = grid()
    first, again, other = (fit(JOINT, x, planted(x, 0), samples=50, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.samples, again.samples)
    assert not np.array_equal(first.samples, other.samples)


def test_largest_point_is_predicted() -> None:
    x = grid()
    inside = 0
    for seed in range(20):
        y = planted(x, seed)
        found, left_out = held_out_largest(JOINT, x, y, samples=200)
        assert left_out.sum() == 1
        assert found.points == 59
        largest = {name: values[left_out] for name, values in x.items()}
        assert largest == {"parameters": pytest.approx(1e6), "tokens": pytest.approx(1e7)}
        assert found.predict(largest)[0] == pytest.approx(y[left_out][0], rel=0.05)
        low, high = found.forecast(largest)
        inside += bool(low[0] <= y[left_out][0] <= high[0])
    assert inside >= 17


def test_an_outlier_hardly_moves_the_law() -> None:
    x = grid()
    y = planted(x, 0)
    y[17] *= 1.5
    assert fit(JOINT, x, y, samples=2).values["exponent:tokens"] == pytest.approx(0.28, rel=0.06)


def test_intervals_know_of_floors_that_the_law_left() -> None:
    """Where the best law has no E but laws with one are hardly worse, the intervals hold both."""
    x = np.geomspace(1e3, 1e5, 8)
    y = (0.6 + 3.0 * x**-0.3) * np.exp(0.02 * np.random.default_rng(26).normal(size=8))
    found = fit(SIMPLE, {"parameters": x}, y)
    low, high = found.interval("E")
    assert found.values["E"] < 1e-6  # noise has it so
    assert low < 1e-6
    assert high > 0.6
    low, high = found.interval("exponent:parameters")
    assert low < 0.3 < high


def test_a_step_is_no_infinity() -> None:
    x = np.geomspace(1e10, 1.28e12, 8)
    y = np.array([0.95, *(0.80 + 0.001 * np.array([1, -1, 2, -2, 1, 0, -1]))])
    found = fit(Form(("compute",)), {"compute": x}, y)
    assert found.values["exponent:compute"] == pytest.approx(STEEPEST)
    assert np.isfinite(found.predict({"compute": x})).all()
    assert np.isfinite(found.band({"compute": np.geomspace(1e8, 1e14, 9)})).all()


def test_repetitions_of_the_largest_point_are_left_out_with_it() -> None:
    x = {"parameters": np.array([1e3, 2e3, 4e3, 8e3, 1.6e4, 3.2e4, 3.21e4])}
    y = 0.5 + 3 * x["parameters"] ** -0.3
    found, left_out = held_out_largest(SIMPLE, x, y, [0, 1, 2, 3, 4, 5, 5], samples=2)
    assert left_out.tolist() == [False] * 5 + [True] * 2
    assert found.points == 5


def test_what_cannot_be_fitted_is_an_error() -> None:
    x = {"parameters": np.array([1.0, 2.0, 3.0])}
    with pytest.raises(ConfigError, match="3 points are too few"):
        fit(SIMPLE, x, np.array([3.0, 2.0, 1.0]))
    with pytest.raises(ConfigError, match="positive"):
        fit(POWER, {"compute": np.array([1.0, 2.0, 3.0])}, np.array([1.0, 0.0, 1.0]))


def test_approximate_entropy_of_textbook_sequences() -> None:
    assert approximate_entropy([85, 80, 89] * 17, m=2, r=3) == pytest.approx(1.09965e-5, rel=1e-5)
    assert approximate_entropy([7] * 50) == 0.0
    assert approximate_entropy([1, 2] * 25, m=2, r=0) == pytest.approx(2.08261e-4, rel=1e-5)
    assert approximate_entropy(range(50), m=2, r=0) == pytest.approx(math.log(49 / 48), rel=1e-12)
    assert approximate_entropy(np.random.default_rng(0).integers(0, 9, 50), m=2, r=-1) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 3"):
        approximate_entropy([1, 2], m=2)


class _Store:
    """Users' items, one after the other."""

    def __init__(self, users: list[list[int]]) -> None:
        self.users = users

    def gather(self, sequences: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> object:
        parts = [self.users[s][a:b] for s, a, b in zip(sequences, starts, stops, strict=True)]
        return type("Events", (), {"item_ids": np.concatenate(parts)})


def test_entropy_is_the_mean_over_the_last_items_of_users() -> None:
    users = [[9, 9, 9, *range(50)], [1, 2] * 25, [1, 2]]
    stops = np.array([len(user) for user in users])
    split = LeaveOneOut(_Store(users), np.arange(3), np.zeros(3, dtype=np.int64), stops, "train")  # type: ignore[arg-type]
    assert mean_entropy(split, last=50) == pytest.approx((math.log(49 / 48) + 2.08261e-4) / 2, rel=1e-5)


@pytest.mark.parametrize("sign", ["divide", "multiply"])
def test_performance_law_predicts_what_was_planted(sign: str) -> None:
    rng = np.random.default_rng(0)
    blocks, width, tokens = (x.ravel() for x in np.meshgrid([1, 2, 4, 8, 16], [16, 32, 64, 128], [1e5, 3e5, 1e6]))
    entropy = 0.02 + 0.01 * (tokens < 5e5)
    corrected = corrected_tokens(tokens, entropy, sign)  # type: ignore[arg-type]
    truth = PerformanceLaw((-0.06, -0.05, 0.6, 0.4, -0.01), 0.6, sign, 1.0)  # type: ignore[arg-type]
    metric = truth.predict(blocks, width, corrected)
    assert 0.0 < metric.min() < metric.max() < 1.0
    noisy = metric * (1 + 0.005 * rng.normal(size=len(metric)))
    found = fit_performance_law(blocks, width, tokens, entropy, noisy, sign)  # type: ignore[arg-type]
    assert found.r_squared > 0.99
    assert found.predict(blocks, width, corrected) == pytest.approx(metric, rel=0.01)
    larger = [24], [192], corrected_tokens([2e6], [0.02], sign)  # type: ignore[arg-type]
    assert found.predict(*larger) == pytest.approx(truth.predict(*larger), rel=0.03)


def test_signs_of_the_corrected_tokens() -> None:
    assert corrected_tokens([100.0], [0.5], "divide") == [200.0]
    assert corrected_tokens([100.0], [0.5], "multiply") == [50.0]
    with pytest.raises(ConfigError, match="above 0"):
        corrected_tokens([100.0], [0.0], "multiply")
