"""What a study's points say: laws by family, the largest point predicted, the Performance Law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_rec.errors import ConfigError
from npu_rec.registry import lookup, names
from npu_rec.scaling.fits import Array, Fit, Form, fit, held_out_largest
from npu_rec.scaling.groups import families, groups, variants
from npu_rec.scaling.performance_law import PerformanceLaw, Sign, corrected_tokens, fit_performance_law
from npu_rec.scaling.results import Row, value_of

VARIABLES = {"parameters": "parameters", "flops": "compute", "tokens": "data"}
"""Key of a row -> what laws call it."""
BOOTSTRAP = 500
SPAN = 2.0
"""Sizes, of the model or of the data, that a law needs: variants of one size make none."""
APART = 1.01
"""Ratio from which on two values of a variable are different ones: shares of other seeds differ by a few sequences."""


@dataclass(frozen=True)
class HeldOut:
    """A prediction: `measured` is the mean over the seeds of the largest point."""

    point: str
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        """Whether the measurement lies in the 95 % interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Law:
    """A fitted law of one family of points and one target.

    Attributes:
        family: the backbone, and what else the points have in common that is no size (`families`).
        kind: `joint`, `parameters`, `compute` or `data`.
        fit: to all points.
        held_out: how the largest point came out when the law was fitted without it, or None where too few are left.
    """

    family: str
    target: str
    kind: str
    fit: Fit
    held_out: HeldOut | None


@dataclass(frozen=True)
class Surface:
    """The Performance Law of one family and metric; `largest_error` of its points, relative."""

    family: str
    target: str
    law: PerformanceLaw
    points: int
    largest_error: float


def quantity(target: str, rows: list[Row]) -> Array:
    """What laws are fitted to, `[n]`: a loss as it is, of a metric that should rise its distance from 1."""
    measured = np.array([value_of(row, target) for row in rows], dtype=np.float64)
    return measured if is_loss(target) else 1.0 - measured


def quantity_name(target: str) -> str:
    """In words: the target, or 1 minus it."""
    return target if is_loss(target) else f"1 - {target}"


def is_loss(target: str) -> bool:
    """Whether lower is better."""
    name = target.rpartition("/")[2]
    return name == "loss" or any(lookup("task", task).target.lower_is_better(name) for task in names("task"))


def rows_with(rows: list[Row], target: str) -> list[Row]:
    """Rows that measured a target."""
    return [row for row in rows if value_of(row, target) is not None]


def laws(rows: list[Row], targets: list[str]) -> list[Law]:
    """Every law that the points are enough for.

    A law of one variable takes of a family for parameters and compute the points with the most data, for data those of
    the largest model with several amounts. The joint law takes all of it.
    """
    found: list[Law] = []
    for target in targets:
        for family, members in families(rows).items():
            own = rows_with(members, target)
            chosen = {
                "joint": (Form(("parameters", "data")), own),
                "parameters": (Form(("parameters",)), _most_data(own)),
                "compute": (Form(("compute",)), _most_data(own)),
                "data": (Form(("data",)), _largest_model(own)),
            }
            for kind, (form, points) in chosen.items():
                law = _law(family, target, kind, form, points)
                if law is None and form.floor and len(form.variables) == 1:
                    law = _law(family, target, kind, Form(form.variables, floor=False), points)
                if law is not None:
                    found.append(law)
    return found


def columns(rows: list[Row]) -> dict[str, Array]:
    """`parameters`, `compute` and `data` of rows, `[n]` each."""
    return {name: np.array([row[key] for row in rows], dtype=np.float64) for key, name in VARIABLES.items()}


def fitted_by(variable: str, rows: list[Row]) -> npt.NDArray[np.bool_]:
    """Which rows of one family the law of one variable is fitted to, `[n]`."""
    chosen = {id(row) for row in (_largest_model(rows) if variable == "data" else _most_data(rows))}
    return np.array([id(row) in chosen for row in rows])


def _most_data(rows: list[Row]) -> list[Row]:
    """Those of the grid's largest share of the data; shares of other seeds differ by a few sequences."""
    most = max((row["tokens"] for row in rows), default=0)
    return [row for row in rows if row["tokens"] > 0.9 * most]


def _largest_model(rows: list[Row]) -> list[Row]:
    amounts: dict[int, list[float]] = {}
    for row in rows:
        amounts.setdefault(row["parameters"], []).append(row["tokens"])
    several = [parameters for parameters, tokens in amounts.items() if _distinct(np.array(tokens)) >= 3]
    return [row for row in rows if several and row["parameters"] == max(several)]


def _distinct(values: Array) -> int:
    """How many values there are, those hardly apart counted once."""
    ordered = np.sort(values)
    return 1 + int((ordered[1:] > APART * ordered[:-1]).sum()) if len(ordered) else 0


def _means(values: Array, rows: list[Row]) -> Array:
    """Of each point, over its seeds."""
    own = np.array(variants(rows))
    return np.array([values[own == number].mean() for number in range(own.max() + 1)])


def _least(form: Form) -> int:
    """Points that a law needs, those of other seeds not counted."""
    return form.size + (2 if form.floor else 1)


def _law(family: str, target: str, kind: str, form: Form, rows: list[Row]) -> Law | None:
    """None where the points or the values of a variable are too few, or the values hardly differ."""
    x = columns(rows)
    single = len(form.variables) == 1
    needed = 3 + 2 * (form.floor and single)
    if len(groups(rows)) < _least(form):
        return None
    if any(_distinct(_means(x[name], rows)) < needed for name in form.variables):
        return None
    sizes = [x["parameters" if name == "compute" else name] for name in form.variables]
    if any(size.max() < SPAN * size.min() for size in sizes):
        return None
    y = quantity(target, rows)
    try:
        fitted = fit(form, x, y, samples=BOOTSTRAP)
    except ConfigError:  # a metric of 1, whose distance from 1 has no logarithm
        return None
    return Law(family, target, kind, fitted, _held_out(form, x, y, rows))


def _held_out(form: Form, x: dict[str, Array], y: Array, rows: list[Row]) -> HeldOut | None:
    try:
        fitted, left_out = held_out_largest(form, x, y, variants(rows), samples=BOOTSTRAP)
    except ConfigError:  # too few are left
        return None
    if len(groups(rows)) - 1 < _least(form):
        return None
    largest = {name: np.exp(np.log(values[left_out]).mean(keepdims=True)) for name, values in x.items()}
    low, high = fitted.forecast(largest)
    return HeldOut(
        point=next(row["point"] for row, out in zip(rows, left_out, strict=True) if out),
        measured=float(y[left_out].mean()),
        predicted=float(fitted.predict(largest)[0]),
        low=float(low[0]),
        high=float(high[0]),
    )


def surfaces(rows: list[Row], targets: list[str]) -> list[Surface]:
    """The Performance Law with both signs of D', for metrics measured at 3 depths and 2 widths at least."""
    found = []
    signs: tuple[Sign, Sign] = ("divide", "multiply")
    for target in targets:
        for family, members in families(rows).items():
            own = [row for row in rows_with(members, target) if row["entropy"]]
            depths, widths = ({row[name] for row in own} for name in ("blocks", "width"))
            if is_loss(target) or len(own) < 8 or len(depths) < 3 or len(widths) < 2:
                continue
            blocks, width, tokens, entropy = (
                np.array([row[name] for row in own], dtype=np.float64)
                for name in ("blocks", "width", "tokens", "entropy")
            )
            y = np.array([value_of(row, target) for row in own], dtype=np.float64)
            for sign in signs:
                law = fit_performance_law(blocks, width, tokens, entropy, y, sign)
                predicted = law.predict(blocks, width, corrected_tokens(tokens, entropy, sign))
                error = float(np.max(np.abs(predicted - y) / np.maximum(np.abs(y), 1e-9)))
                found.append(Surface(family, target, law, len(own), error))
    return found


def as_documents(found: list[Law], performance: list[Surface]) -> dict[str, list[dict[str, Any]]]:
    """Laws and surfaces as JSON."""
    return {
        "laws": [
            {
                "family": law.family,
                "target": law.target,
                "quantity": quantity_name(law.target),
                "kind": law.kind,
                "form": str(law.fit.form),
                "points": law.fit.points,
                "values": law.fit.values,
                "intervals": {name: law.fit.interval(name) for name in law.fit.form.names},
                "held_out": None if law.held_out is None else {**vars(law.held_out), "inside": law.held_out.inside},
            }
            for law in found
        ],
        "performance_laws": [
            {
                "family": one.family,
                "target": one.target,
                "sign": one.law.sign,
                "points": one.points,
                "w": one.law.weights,
                "b": one.law.b,
                "r_squared": one.law.r_squared,
                "largest_error": one.largest_error,
            }
            for one in performance
        ],
    }
