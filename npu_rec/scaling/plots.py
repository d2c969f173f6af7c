"""Plots of a study: a target against parameters, compute and data on log axes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np

from npu_rec.scaling.analysis import VARIABLES, Law, backbones_of, columns, is_loss, quantity, rows_with
from npu_rec.scaling.results import Row, value_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

# Okabe and Ito, Color Universal Design (2008): told apart under every common colour-blindness; shapes as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
LABELS = {
    "parameters": "parameters outside the embedding tables",
    "compute": "floating-point operations of training",
    "data": "training events",
}


def draw(rows: list[Row], laws: list[Law], targets: list[str], folder: Path) -> dict[str, Path]:
    """Write `<variable>.png` and `.svg` for each variable that varies; returns variable -> SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.*"):
        if old.stem in LABELS and old.suffix in (".png", ".svg"):
            old.unlink()
    written = {}
    shown = [target for target in targets if any(value_of(row, target) is not None for row in rows)]
    for variable in VARIABLES.values():
        if not shown or len(np.unique(columns(rows)[variable])) < 2:
            continue
        figure = _figure(rows, laws, shown, variable)
        with plt.rc_context({"svg.hashsalt": "npu-rec"}):  # the same points make the same file
            _save(figure, folder / f"{variable}.svg")
            _save(figure, folder / f"{variable}.png")
        plt.close(figure)
        written[variable] = folder / f"{variable}.svg"
    return written


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(buffer, format=path.suffix[1:], dpi=200, metadata=metadata)
    path.write_bytes(buffer.getvalue())


def _figure(rows: list[Row], laws: list[Law], targets: list[str], variable: str) -> Figure:
    figure, axes = plt.subplots(
        1, len(targets), figsize=(4.4 * len(targets), 3.8), constrained_layout=True, squeeze=False
    )
    for axis, target in zip(axes[0], targets, strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        for colour, shape, backbone in _styles(rows):
            own = rows_with(rows, target, backbone)
            x = columns(own)[variable]
            y = quantity(target, own)
            axis.plot(x, y, shape, ms=5, color=colour, mec="white", mew=0.6, label=backbone)
            for law in laws:
                if (law.backbone, law.target, law.kind) == (backbone, target, variable):
                    line = np.geomspace(x.min() / 1.2, x.max() * 1.2, 80)
                    low, high = law.fit.band({variable: line})
                    axis.fill_between(line, low, high, color=colour, alpha=0.18, lw=0)
                    axis.plot(line, law.fit.predict({variable: line}), color=colour, lw=1.4)
        axis.set_xlabel(LABELS[variable], fontsize=9)
        axis.set_title(target if is_loss(target) else f"1 - {target}", fontsize=10)
        plain = StrMethodFormatter("{x:.3g}")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(plain if high < 12 * low else NullFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=8, which="both")
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _styles(rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    """Colour, shape and backbone; a backbone's place does not depend on which of the others were measured."""
    known = ["hstu", "llama", "gpt", "sasrec"]
    others = [name for name in backbones_of(rows) if name not in known]
    for place, name in enumerate([*known, *others]):
        if name in backbones_of(rows):
            yield COLOURS[place % len(COLOURS)], SHAPES[place % len(SHAPES)], name
