"""Table, plots and `report.html` of a study, from its finished rows alone."""

from __future__ import annotations

import base64
import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_rec.scaling.analysis import Law, Surface, as_documents, laws, quantity_name, surfaces
from npu_rec.scaling.groups import SEED, groups
from npu_rec.scaling.plots import draw
from npu_rec.scaling.results import Row, value_of
from npu_rec.scaling.study import Study
from npu_rec.train.run_dir import without_nan

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 1200px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 }
h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dde6 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #e6e9ef; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
img { width: 100%; height: auto }
.muted { color: #66708a }
"""
Table = tuple[list[str], list[list[str]]]
"""Heads and rows of cells."""


@dataclass(frozen=True)
class Report:
    """What was written and found."""

    path: Path
    laws: list[Law]
    surfaces: list[Surface]

    def as_document(self) -> dict[str, Any]:
        """As JSON."""
        return {"report": self.path, **as_documents(self.laws, self.surfaces)}


def write_report(study: Study, rows: list[Row], out: Path, failed: Sequence[Row] = ()) -> Report:
    """Write `table.md`, `fits.json`, `plots/` and `report.html` into `out`.

    Args:
        rows: of the finished points; failed: of those that failed.
    """
    targets = study.config.targets
    found, performance = laws(rows, targets), surfaces(rows, targets)
    images = draw(rows, found, targets, out / "plots") if rows else {}
    points = points_table(rows, targets)
    means = seeds_table(rows, targets) if any(SEED in row["settings"] for row in rows) else None
    (out / "table.md").write_text(
        _markdown(points) + ("" if means is None else f"\n{_markdown(means)}"), encoding="utf-8"
    )
    fits = without_nan(as_documents(found, performance))
    (out / "fits.json").write_text(json.dumps(fits, indent=1), encoding="utf-8")
    name = html.escape(study.config.name)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1><p class='muted'>{len(rows)} of {len(study.points)} points are finished, with "
        f"{study.config.threads} CPU threads each</p>",
        *(_image(title, path) for title, path in images.items()),
        "<p>Curves are laws of one variable with their 95 % bands, fitted to the filled points: against parameters and "
        "compute those with the most data, against data those of the largest model. Dotted curves are the joint law, "
        "one for each amount of data or each size. In these a metric m that should rise is drawn as 1 - m: lower is "
        "better. Against a setting of the grid it is drawn as it is.</p>",
        "<h2>Laws</h2><p>Fitted to the loss, and to 1 minus a metric, in log space with a Huber loss; in brackets "
        "95 % intervals of a residual bootstrap. Data are the training events of an epoch; ranking counts one as often "
        "as it is read in another window or history.</p>",
        _html(laws_table(found)) if found else "<p>Too few points differ for a law.</p>",
    ]
    predicted = [law for law in found if law.held_out is not None]
    if predicted:
        parts += ["<h2>The largest point, predicted from the others</h2>", _html(held_out_table(predicted))]
    if performance:
        parts += [
            "<h2>Performance Law</h2><p>D' is events over Approximate Entropy (divide) or events times it (multiply); "
            "the published texts state both. Its terms of D' have no weight: it can say little of the data.</p>",
            _html(surfaces_table(performance)),
        ]
    if means is not None:
        parts += ["<h2>Means over the seeds</h2><p>With the standard deviation of a seed.</p>", _html(means)]
    parts += ["<h2>Points</h2>", _html(points)]
    if failed:
        reasons = [[row["point"], str(row["reason"])] for row in failed]
        parts += ["<h2>Points that failed</h2>", _html((["point", "reason"], reasons))]
    parts.append("</html>")
    (out / "report.html").write_text("\n".join(parts), encoding="utf-8")
    return Report(out / "report.html", found, performance)


def points_table(rows: list[Row], targets: list[str]) -> Table:
    """A row a point."""
    shown = [target for target in targets if any(value_of(row, target) is not None for row in rows)]
    counts = ("parameters", "FLOPs/token", "events", "events seen", "epochs", "best epoch", "seconds")
    cells = []
    for row in rows:
        values = [value_of(row, target) for target in shown]
        cells.append(
            [
                row["point"], f"{row['parameters']:,}", f"{row['flops_per_token']:.4g}", f"{row['tokens']:,}",
                f"{row['tokens_seen']:,}", str(row["epochs"]), str(row["best_epoch"]), f"{row['seconds']:.0f}",
                *("" if value is None else f"{value:.4f}" for value in values),
            ]
        )  # fmt: skip
    return ["point", *counts, *shown], cells


def seeds_table(rows: list[Row], targets: list[str]) -> Table:
    """A row for the seeds of one setting: mean, and the standard deviation where there are two or more."""
    shown = [target for target in targets if any(value_of(row, target) is not None for row in rows)]
    cells = []
    for group in groups(rows):
        measured = [group.values(target) for target in shown]
        cells.append([group.label or "all", str(len(group.rows)), *(_mean(values) for values in measured)])
    return ["setting", "seeds", *shown], cells


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def laws_table(found: list[Law]) -> Table:
    """A row a law."""
    cells = []
    for law in found:
        letters = iter("AaBbCcDd")
        numbers = [f"{name if name == 'E' else next(letters)} {_number(law, name)}" for name in law.fit.form.names]
        cells.append(
            [
                law.family,
                quantity_name(law.target),
                law.kind,
                str(law.fit.form),
                str(law.fit.points),
                "; ".join(numbers),
            ]
        )
    return ["points of", "quantity", "law", "form", "points", "numbers"], cells


def _number(law: Law, name: str) -> str:
    low, high = law.fit.interval(name)
    return f"{law.fit.values[name]:.3g} [{low:.3g}, {high:.3g}]"


def held_out_table(found: list[Law]) -> Table:
    """A row a prediction."""
    cells = []
    for law in found:
        held_out = law.held_out
        if held_out is not None:
            span = f"[{held_out.low:.4f}, {held_out.high:.4f}]"
            measured, predicted = f"{held_out.measured:.4f}", f"{held_out.predicted:.4f}"
            inside = "yes" if held_out.inside else "no"
            cells.append(
                [law.family, quantity_name(law.target), law.kind, held_out.point, measured, predicted, span, inside]
            )
    return ["points of", "quantity", "law", "point", "measured", "predicted", "95 % interval", "inside"], cells


def surfaces_table(performance: list[Surface]) -> Table:
    """A row a surface."""
    cells = [
        [
            one.family, one.target, one.law.sign, str(one.points), f"{one.law.r_squared:.3f}",
            f"{one.largest_error:.1%}", ", ".join(f"{w:.3g}" for w in one.law.weights), f"{one.law.b:.3g}",
        ]
        for one in performance
    ]  # fmt: skip
    return ["points of", "target", "D'", "points", "R squared", "largest error", "w1 to w5", "b"], cells


def _image(label: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    title = html.escape(label[0].upper() + label[1:])
    return f"<h2>{title}</h2><img alt='{title}' src='data:image/svg+xml;base64,{data}'>"


def _html(table: Table) -> str:
    heads, rows = table
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _markdown(table: Table) -> str:
    heads, rows = table
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
