"""The Performance Law: HR or NDCG from depth, width and data (arXiv 2412.00430).

    Perf = w1 (-1 / (2 N^w3) - w3 ln N) + w2 (-1 / (2 h^w4) - w4 ln h) - 1 / (2 D'^w5) - w5 ln D' + b

with N blocks, width h and D' the tokens corrected by their Approximate Entropy. This is the form that the authors'
fitting code uses. It is not monotone: quality may fall when the model is too large for its data. The terms of D' have
no weight, so more data can raise Perf by no more than w5 lets them, about a hundredth for four times the data.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from npu_rec.errors import ConfigError
from npu_rec.scaling.fits import Array, needs_scipy

Sign = Literal["divide", "multiply"]

STARTS = 4
"""Exponents of a coarse grid, those with the least error, from which the search goes."""


def corrected_tokens(tokens: npt.ArrayLike, entropy: npt.ArrayLike, sign: Sign) -> Array:
    """D': `divide` is tokens / ApEn, as in the paper's main text and the authors' code; `multiply` tokens * ApEn.

    The published texts state both; nothing in them decides.

    Raises:
        ConfigError: an entropy of 0 (or none).
    """
    count, corrected = np.asarray(tokens, dtype=np.float64), np.asarray(entropy, dtype=np.float64)
    if not (corrected > 0).all():
        raise ConfigError("the Performance Law needs an Approximate Entropy above 0; choose another r")
    result: Array = count / corrected if sign == "divide" else count * corrected
    return result


@dataclass(frozen=True)
class PerformanceLaw:
    """A fitted surface.

    Attributes:
        weights: w1 to w5.
        b: the constant.
        r_squared: share of the variance of the fitted points that it explains.
    """

    weights: tuple[float, float, float, float, float]
    b: float
    sign: Sign
    r_squared: float

    def predict(self, blocks: npt.ArrayLike, width: npt.ArrayLike, corrected: npt.ArrayLike) -> Array:
        """The metric `[n]` at numbers of blocks, widths and D'."""
        w1, w2, w3, w4, w5 = self.weights
        depth, wide, data = _terms((w3, w4, w5), *(_logs(x) for x in (blocks, width, corrected)))
        predicted: Array = w1 * depth + w2 * wide + data + self.b
        return predicted


def fit_performance_law(
    blocks: npt.ArrayLike,
    width: npt.ArrayLike,
    tokens: npt.ArrayLike,
    entropy: npt.ArrayLike,
    metric: npt.ArrayLike,
    sign: Sign = "divide",
) -> PerformanceLaw:
    """Least squares over the points `[n]`: w1, w2 and b are linear and solved for, scipy searches w3, w4, w5.

    w1 and w3 (and w2 and w4) are nearly interchangeable for small exponents, so judge the surface by its predictions,
    not by its weights.

    Raises:
        ConfigError: fewer than 7 points, or no entropy.
        UserError: scipy is not installed.
    """
    needs_scipy()
    from scipy.optimize import least_squares

    logs = [_logs(x) for x in (blocks, width, corrected_tokens(tokens, entropy, sign))]
    y = np.asarray(metric, dtype=np.float64)
    if len(y) < 7:
        raise ConfigError(f"the Performance Law has 6 numbers; {len(y)} points are too few")

    def solve(exponents: Array) -> tuple[Array, Array]:
        depth, wide, data = _terms(exponents, *logs)
        design = np.stack([depth, wide, np.ones_like(y)], 1)
        linear = np.asarray(np.linalg.lstsq(design, y - data, rcond=None)[0], dtype=np.float64)
        return linear, design @ linear + data - y

    grid = itertools.product((-0.5, 0.05, 0.3, 1.0, 2.0), (-0.5, 0.05, 0.3, 1.0, 2.0), (-0.1, -0.02, 0.0, 0.02, 0.1))
    starts = sorted(grid, key=lambda w: float((solve(np.array(w))[1] ** 2).sum()))[:STARTS]
    ends = [
        least_squares(lambda w: solve(w)[1], start, bounds=(-4.0, 4.0), x_scale=(1, 1, 0.1), ftol=1e-7, max_nfev=60)
        for start in starts
    ]
    best = min(ends, key=lambda end: float(end.cost))
    (w1, w2, b), residuals = solve(best.x)
    spread = float(((y - y.mean()) ** 2).sum())
    r_squared = 1.0 - float((residuals**2).sum()) / spread if spread else float("nan")
    w3, w4, w5 = best.x.tolist()
    return PerformanceLaw((float(w1), float(w2), w3, w4, w5), float(b), sign, r_squared)


def _logs(x: npt.ArrayLike) -> Array:
    logs: Array = np.log(np.asarray(x, dtype=np.float64))
    return logs


def _terms(exponents: npt.ArrayLike, *logs: Array) -> list[Array]:
    pairs = zip(np.asarray(exponents, dtype=np.float64), logs, strict=True)
    return [-0.5 * np.exp(-w * x) - w * x for w, x in pairs]
