"""Plots of a study: a target against parameters, compute and data with the laws, and against what the grid varies."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np

from npu_rec.scaling.analysis import VARIABLES, Law, columns, fitted_by, quantity, quantity_name, rows_with
from npu_rec.scaling.groups import SEED, Group, curves, families, groups, numeric_settings
from npu_rec.scaling.results import Row, value_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

# Okabe and Ito, Color Universal Design (2008): told apart under every common colour-blindness; shapes as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
MOST_SETTINGS = 40
LABELS = {
    "parameters": "parameters outside the embedding tables",
    "compute": "floating-point operations of training",
    "data": "training events",
}


def draw(rows: list[Row], laws: list[Law], targets: list[str], folder: Path) -> dict[str, Path]:
    """Write a `.png` and a `.svg` for each setting and each variable that varies; returns title -> SVG.

    A setting of the grid is drawn where it takes three numbers or more and everything else makes seven curves at most;
    where the seed is in the grid, the means over it of every setting are drawn, up to forty; against parameters,
    compute and data up to seven families are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.*"):
        if old.suffix in (".png", ".svg"):
            old.unlink()
    shown = [target for target in targets if any(value_of(row, target) is not None for row in rows)]
    if not shown:
        return {}
    written = {}
    numeric = numeric_settings(rows)
    last = [setting.rpartition(".")[2] for setting in numeric]
    for setting, short in zip(numeric, last, strict=True):
        if len(curves(rows, setting)) <= len(COLOURS):
            name = short if last.count(short) == 1 and short not in VARIABLES.values() else setting
            written[name] = _write(_settings_figure(rows, shown, setting), folder / name)
    if 1 < len(groups(rows)) <= MOST_SETTINGS and any(SEED in row["settings"] for row in rows):
        written["settings"] = _write(_groups_figure(groups(rows), shown), folder / "settings")
    for variable in VARIABLES.values():
        if len(np.unique(columns(rows)[variable])) >= 2 and len(families(rows)) <= len(COLOURS):
            written[LABELS[variable]] = _write(_laws_figure(rows, laws, shown, variable), folder / variable)
    return written


def _write(figure: Figure, path: Path) -> Path:
    with plt.rc_context({"svg.hashsalt": "npu-rec"}):  # the same points make the same file
        _save(figure, path.with_suffix(".svg"))
        _save(figure, path.with_suffix(".png"))
    plt.close(figure)
    return path.with_suffix(".svg")


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(buffer, format=path.suffix[1:], dpi=200, metadata=metadata)
    path.write_bytes(buffer.getvalue())


def _axes(targets: list[str], height: float = 3.8) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, len(targets), figsize=(4.4 * len(targets), height), constrained_layout=True, squeeze=False
    )
    for axis, target in zip(axes[0], targets, strict=True):
        axis.set_title(target, fontsize=10)
        axis.tick_params(labelsize=8, which="both")
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _settings_figure(rows: list[Row], targets: list[str], setting: str) -> Figure:
    """Means over the seeds, with the smallest and the largest."""
    figure, axes = _axes(targets)
    drawn = curves(rows, setting)
    for axis, target in zip(axes, targets, strict=True):
        ticks = set()
        for colour, shape, label in _styles(list(drawn)):
            own = [(float(group.settings[setting]), group.values(target)) for group in drawn[label]]
            own = [(x, values) for x, values in own if values]
            x, means = [x for x, _ in own], [float(np.mean(values)) for _, values in own]
            axis.vlines(x, [min(values) for _, values in own], [max(values) for _, values in own], color=colour, lw=1)
            axis.plot(x, means, marker=shape, label=label, color=colour, lw=1.4, ms=6, mec="white", mew=0.6)
            ticks |= set(x)
        if min(ticks, default=1.0) > 0:
            axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(setting.rpartition(".")[2], fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _groups_figure(drawn: list[Group], targets: list[str]) -> Figure:
    """Every seed and the mean, a line a setting, the first at the top with a rule through its mean."""
    figure, axes = _axes(targets, 0.6 + 0.28 * len(drawn))
    for axis, target in zip(axes, targets, strict=True):
        for place, group in enumerate(drawn):
            values = group.values(target)
            if not values:
                continue
            mean = float(np.mean(values))
            axis.plot(values, [place] * len(values), "o", ms=4, color=COLOURS[0], alpha=0.45, mew=0)
            axis.plot(mean, place, "|", ms=11, mew=2, color=COLOURS[0] if place else COLOURS[1])
            if place == 0:
                axis.axvline(mean, color=COLOURS[1], lw=0.8, ls=":")
        axis.set_yticks(range(len(drawn)), [group.label for group in drawn] if axis is axes[0] else [])
        axis.set_ylim(len(drawn) - 0.5, -0.5)
    return figure


def _laws_figure(rows: list[Row], laws: list[Law], targets: list[str], variable: str) -> Figure:
    figure, axes = _axes(targets)
    for axis, target in zip(axes, targets, strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        members = families(rows)
        for colour, shape, family in _styles(list(members)):
            own = rows_with(members[family], target)
            if not own:
                continue
            x, y, fitted = columns(own)[variable], quantity(target, own), fitted_by(variable, own)
            axis.plot(x[~fitted], y[~fitted], shape, ms=4, mfc="none", color=colour, mew=0.8)
            axis.plot(x[fitted], y[fitted], shape, ms=5, label=family, color=colour, mew=0.8)
            line = np.geomspace(x.min() / 1.2, x.max() * 1.2, 80)
            for law in laws:
                if (law.family, law.target, law.kind) == (family, target, variable):
                    low, high = law.fit.band({variable: line})
                    axis.fill_between(line, low, high, color=colour, alpha=0.18, lw=0)
                    axis.plot(line, law.fit.predict({variable: line}), color=colour, lw=1.4)
                if (law.family, law.target, law.kind) == (family, target, "joint") and variable != "compute":
                    other = "data" if variable == "parameters" else "parameters"
                    for size in np.unique(columns(own)[other]):
                        joint = law.fit.predict({variable: line, other: np.full_like(line, size)})
                        axis.plot(line, joint, color=colour, lw=0.7, ls=":")
        axis.set_xlabel(LABELS[variable], fontsize=9)
        axis.set_title(quantity_name(target), fontsize=10)
        lowest, highest = axis.get_ylim()
        if highest < 5 * lowest:  # decades would leave an axis without labels
            axis.yaxis.set_major_locator(MaxNLocator(6))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        lowest, highest = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 200 * lowest else (1,)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _styles(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Colour, shape and name; a backbone's place does not depend on which of the others were measured."""
    known = ["hstu", "llama", "gpt", "sasrec"]
    if not set(known) & set(names):
        known = []
    for place, name in enumerate([*known, *(name for name in names if name not in known)]):
        if name in names:
            yield COLOURS[place % len(COLOURS)], SHAPES[place % len(SHAPES)], name
