"""Scaling laws: sums of power laws fitted in log space with a Huber loss.

The method is approach 3 of Hoffmann et al., Training Compute-Optimal Large Language Models (arXiv 2203.15556): with
E = exp(e) and A = exp(a), log L is the log-sum-exp of e, a - alpha log N and b - beta log D, and L-BFGS minimises the
Huber loss of its residuals from a grid of starts. Exponents are sought up to 4: beyond it a law is a step.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npu_rec.errors import ConfigError, UserError

Array = npt.NDArray[np.float64]

HUBER_DELTA = 0.01
"""Residual of log L from which on the loss is linear: about the noise of a repeated training."""
STEEPEST = 4.0
"""Bound of the exponents, of either sign."""
_FLOORS = (0.1, 0.5, 0.8, 0.95)
"""Shares of E in the least L from which fits start."""


@dataclass(frozen=True)
class Form:
    """L = E + sum of C / x^c over the variables x.

    Attributes:
        variables: what L depends on, such as `("parameters", "tokens")`: the joint law.
        floor: whether there is an E; without it and with one variable this is a pure power law.
    """

    variables: tuple[str, ...]
    floor: bool = True

    @property
    def size(self) -> int:
        """How many numbers are fitted."""
        return 2 * len(self.variables) + self.floor

    @property
    def names(self) -> list[str]:
        """Of the numbers: `E`, then for each variable `A:<variable>` and `exponent:<variable>`."""
        own = [name for x in self.variables for name in (f"A:{x}", f"exponent:{x}")]
        return ["E", *own] if self.floor else own

    def __str__(self) -> str:
        parts = [f"{letter.upper()}/{x}^{letter}" for letter, x in zip("abcd", self.variables, strict=False)]
        return " + ".join(["E", *parts] if self.floor else parts)


@dataclass(frozen=True)
class Fit:
    """A law that was fitted.

    Attributes:
        theta: `[P]` logarithms of E and of each term at `centre`, and the exponents, in the order of `Form.names`.
        resampled: `[S, P]` the same from the resampled points.
        centre: `[V]` mean logarithm of each variable.
        residuals: `[n]` of log L.
    """

    form: Form
    theta: Array
    resampled: Array
    centre: Array
    residuals: Array

    @property
    def points(self) -> int:
        """How many the law was fitted to."""
        return len(self.residuals)

    @property
    def values(self) -> dict[str, float]:
        """Number -> value, named as `Form.names`; an A of a steep law may be infinite."""
        numbers = _numbers(self.form, self.theta[None], self.centre)[0]
        return dict(zip(self.form.names, numbers.tolist(), strict=True))

    @property
    def samples(self) -> Array:
        """`[S, P]` values from the resampled points, in the order of `Form.names`."""
        return _numbers(self.form, self.resampled, self.centre)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of one number."""
        low, high = _quantiles(self.samples[:, self.form.names.index(name)], level)
        return float(low), float(high)

    def predict(self, x: Mapping[str, npt.ArrayLike]) -> Array:
        """L `[n]` at points of the variables `[n]`."""
        predicted: Array = self._laws(self.theta[None], x)[0]
        return predicted

    def band(self, x: Mapping[str, npt.ArrayLike], level: float = 0.95) -> tuple[Array, Array]:
        """Interval of the law itself, lower and upper `[n]`."""
        return _quantiles(self._laws(self.resampled, x), level)

    def forecast(self, x: Mapping[str, npt.ArrayLike], level: float = 0.95, seed: int = 0) -> tuple[Array, Array]:
        """Interval of a new measurement: that of the law and the scatter about it, lower and upper `[n]`."""
        laws = self._laws(self.resampled, x)
        noise = np.random.default_rng(seed).choice(self._scatter(), laws.shape)
        return _quantiles(laws * np.exp(noise), level)

    def _laws(self, theta: Array, x: Mapping[str, npt.ArrayLike]) -> Array:
        laws: Array = np.exp(_log_law(self.form, theta, _columns(self.form, x) - self.centre)[0])
        return laws

    def _scatter(self) -> Array:
        return _inflated(self.residuals, self.form.size)


def fit(
    form: Form,
    x: Mapping[str, npt.ArrayLike],
    y: npt.ArrayLike,
    *,
    samples: int = 500,
    seed: int = 0,
    delta: float = HUBER_DELTA,
    starts: int = 8,
) -> Fit:
    """Fit a law to points.

    Intervals come from a residual bootstrap: the residuals, centred and inflated for the numbers fitted and for how few
    are left, are drawn anew about the law, and the law is fitted again from where it was. A law with an E of 0 or an
    exponent at its bound, from where no slope leads away, is also fitted from two other starts.

    Args:
        x: variable -> `[n]`, positive.
        y: `[n]`, positive.
        samples: fits to resampled points.
        starts: of the grid those with the least loss, from which L-BFGS goes.

    Raises:
        ConfigError: too few points, or a value that is not positive.
        UserError: scipy is not installed.
    """
    columns, values = _columns(form, x), np.asarray(y, dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0).all() and np.isfinite(columns).all()):
        raise ConfigError("a scaling law is fitted to positive numbers")
    if len(values) <= form.size:
        raise ConfigError(f"{form} has {form.size} numbers; {len(values)} points are too few")
    centre = columns.mean(0)
    shifted, log_y = columns - centre, np.log(values)
    theta = _best(form, shifted, log_y, delta, starts)
    residuals = log_y - _log_law(form, theta[None], shifted)[0][0]
    rng = np.random.default_rng(seed)
    drawn = rng.choice(_inflated(residuals, form.size), (samples, len(values)))
    starts_again = [theta]
    if _at_a_bound(form, theta, log_y):
        starts_again += list(_nearest(form, shifted, log_y, delta))
    resampled = _resampled(form, starts_again, shifted, log_y - residuals + drawn, delta)
    return Fit(form, theta, resampled, centre, residuals)


def needs_scipy() -> None:
    """Raise UserError where scipy is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("fits need scipy: pip install 'npu-rec[scaling]'")


def held_out_largest(
    form: Form,
    x: Mapping[str, npt.ArrayLike],
    y: npt.ArrayLike,
    variants: npt.ArrayLike | None = None,
    *,
    samples: int = 500,
    seed: int = 0,
) -> tuple[Fit, npt.NDArray[np.bool_]]:
    """The law fitted without the largest point, and which points `[n]` that left out.

    The largest is the one with the largest product of the variables.

    Args:
        variants: `[n]` numbers, alike for repetitions of a point (other seeds), which are left out together; by
            default every point is one of its own.
    """
    columns = _columns(form, x)
    own = np.arange(len(columns)) if variants is None else np.asarray(variants)
    left_out = own == own[columns.sum(1).argmax()]
    kept = {name: np.asarray(x[name])[~left_out] for name in form.variables}
    return fit(form, kept, np.asarray(y)[~left_out], samples=samples, seed=seed), left_out


def _columns(form: Form, x: Mapping[str, npt.ArrayLike]) -> Array:
    """Logarithms of the variables, `[n, V]`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.stack([np.atleast_1d(np.asarray(x[name], dtype=np.float64)) for name in form.variables], 1))


def _inflated(residuals: Array, fitted: int) -> Array:
    """Residuals as wide as the noise: over sqrt(1 - fitted / n), and by Student's 97.5 % quantile over the normal's."""
    from scipy.stats import norm, t

    n = len(residuals)
    student = t.ppf(0.975, n - fitted) / norm.ppf(0.975)
    scaled: Array = (residuals - residuals.mean()) * np.sqrt(n / (n - fitted)) * student
    return scaled


def _log_law(form: Form, theta: Array, columns: Array) -> tuple[Array, Array]:
    """log L `[S, n]` and its derivatives `[S, n, P]`, for `theta [S, P]` and log x `[n, V]`."""
    first = int(form.floor)
    scales, exponents = theta[:, None, first::2], theta[:, None, first + 1 :: 2]
    terms = scales - exponents * columns  # [S, n, V]
    if form.floor:
        terms = np.concatenate([np.broadcast_to(theta[:, None, :1], (*terms.shape[:2], 1)), terms], 2)
    top = terms.max(2, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(2, keepdims=True)
    shares /= total
    gradient = np.empty((*terms.shape[:2], form.size))
    if form.floor:
        gradient[..., 0] = shares[..., 0]
    gradient[..., first::2] = shares[..., first:]
    gradient[..., first + 1 :: 2] = -shares[..., first:] * columns
    return (top + np.log(total))[..., 0], gradient


def _numbers(form: Form, theta: Array, centre: Array) -> Array:
    """From logarithms about the centre of the points to E, A and the exponents."""
    first = int(form.floor)
    numbers = theta.copy()
    numbers[:, first::2] += theta[:, first + 1 :: 2] * centre
    if form.floor:
        numbers[:, 0] = np.exp(numbers[:, 0])
    with np.errstate(over="ignore"):  # an A of a steep law, at x = 1
        numbers[:, first::2] = np.exp(numbers[:, first::2])
    return numbers


def _huber(residuals: Array, delta: float) -> Array:
    """Sum over the last dimension, in units of delta squared."""
    size = np.abs(residuals) / delta
    loss: Array = np.where(size <= 1, 0.5 * size**2, size - 0.5).sum(-1)
    return loss


def _best(form: Form, columns: Array, log_y: Array, delta: float, starts: int) -> Array:
    needs_scipy()
    from scipy.optimize import minimize

    def objective(theta: Array) -> tuple[float, Array]:
        law, gradient = _log_law(form, theta[None], columns)
        residuals = law[0] - log_y
        return float(_huber(residuals, delta)), np.clip(residuals / delta, -1, 1) @ gradient[0] / delta

    grid = _grid(form, log_y)
    losses = _huber(_log_law(form, grid, columns)[0] - log_y, delta)
    options = {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-7}
    bounds = [(None, None) if low == -np.inf else (low, high) for low, high in _bounds(form).T]
    ends = [
        minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for start in grid[np.argsort(losses, kind="stable")[:starts]]
    ]
    best: Array = min(ends, key=lambda end: float(end.fun)).x
    return best


def _bounds(form: Form) -> Array:
    """Lower and upper bound of each number, `[2, P]`."""
    steepest = [STEEPEST if name.startswith("exponent") else np.inf for name in form.names]
    return np.array([[-x for x in steepest], steepest])


def _at_a_bound(form: Form, theta: Array, log_y: Array) -> bool:
    """Whether E is nothing beside the least L, or an exponent as large as it may be."""
    steep = np.abs(theta[form.floor + 1 :: 2]).max() > 0.99 * STEEPEST
    return bool(steep or (form.floor and theta[0] < log_y.min() - 7))


def _grid(form: Form, log_y: Array) -> Array:
    """Starts `[S, P]`: shares of the floor in the least value, exponents; the scales then follow from the median."""
    variables = len(form.variables)
    starts = []
    for floor in _FLOORS if form.floor else (0.0,):
        level = floor * np.exp(log_y.min())
        scale = np.log((np.exp(np.median(log_y)) - level) / variables)
        for exponents in itertools.product((0.05, 0.2, 0.5, 1.0), repeat=variables):
            pairs = [number for exponent in exponents for number in (scale, exponent)]
            starts.append([np.log(level), *pairs] if form.floor else pairs)
    return np.array(starts)


def _nearest(form: Form, columns: Array, log_y: Array, delta: float) -> Array:
    """Of the grid's starts with a middle floor, or of all without one, the two with the least loss, `[2, P]`."""
    grid = _grid(form, log_y)
    if form.floor:
        grid = grid.reshape(len(_FLOORS), -1, form.size)[1:3].reshape(-1, form.size)
    losses = _huber(_log_law(form, grid, columns)[0] - log_y, delta)
    return grid[np.argsort(losses, kind="stable")[:2]]


def _resampled(form: Form, starts: list[Array], columns: Array, log_y: Array, delta: float) -> Array:
    """The best fit `[S, P]` to each of `log_y [S, n]`, from any of the starts `[P]`."""
    ends = np.stack([_refit(form, np.tile(start, (len(log_y), 1)), columns, log_y, delta) for start in starts])
    losses = np.stack([_huber(_log_law(form, theta, columns)[0] - log_y, delta) for theta in ends])
    best: Array = ends[losses.argmin(0), np.arange(len(log_y))]
    return best


def _refit(form: Form, theta: Array, columns: Array, log_y: Array, delta: float, rounds: int = 40) -> Array:
    """Levenberg-Marquardt of many fits at once: `theta [S, P]`, `log_y [S, n]`; Huber by reweighting."""
    theta, (low, high) = theta.copy(), _bounds(form)
    damping = np.full(len(theta), 1e-3)
    law, gradient = _log_law(form, theta, columns)
    loss = _huber(law - log_y, delta)
    active = np.arange(len(theta))
    for _ in range(rounds):
        residuals = law - log_y[active]
        weighted = gradient / np.maximum(np.abs(residuals) / delta, 1.0)[..., None]
        curvature = np.matmul(weighted.transpose(0, 2, 1), gradient)
        slope = np.einsum("snp,sn->sp", weighted, residuals)
        curvature[:, range(form.size), range(form.size)] *= 1 + damping[:, None]
        curvature[:, range(form.size), range(form.size)] += 1e-9
        step = np.clip(np.linalg.solve(curvature, slope[..., None])[..., 0], -2, 2)
        trial = np.clip(theta[active] - step, low, high)
        new_law, new_gradient = _log_law(form, trial, columns)
        new_loss = _huber(new_law - log_y[active], delta)
        better, settled = new_loss < loss, np.abs(loss - new_loss) <= 1e-6 * (1 + loss)
        theta[active[better]] = trial[better]
        law = np.where(better[:, None], new_law, law)
        gradient = np.where(better[:, None, None], new_gradient, gradient)
        loss = np.where(better, new_loss, loss)
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-9, 1e9)
        if settled.all():
            break
        left = ~settled
        active, damping, loss = active[left], damping[left], loss[left]
        law, gradient = law[left], gradient[left]
    return theta


def _quantiles(samples: Array, level: float) -> tuple[Array, Array]:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
