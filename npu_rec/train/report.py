"""report.html of a run: curves, metrics, configuration and machine in one file without outside assets."""

from __future__ import annotations

import html
import io
import json
from typing import Any

import matplotlib

from npu_rec.config import Config, dump_config
from npu_rec.errors import StorageError
from npu_rec.train.run_dir import RunDirectory

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 1000px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 }
h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dde6 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .9rem; border-bottom: 1px solid #e6e9ef; text-align: right }
td:first-child, th:first-child { text-align: left }
pre { background: #f5f6f9; padding: .8rem; overflow-x: auto; font-size: 12px }
.figures svg { width: 100%; height: auto }
.muted { color: #66708a }
"""
_COLOURS = {"train": "#8a94a8", "epoch": "#1f5fbf", "valid": "#d1495b"}


def write_report(run: RunDirectory, config: Config, metrics: dict[str, dict[str, float]], train_seconds: float) -> None:
    """Write `report.html` from the run's metrics.jsonl."""
    lines = run.metrics()
    steps = max((line["step"] for line in lines), default=0)
    environment = json.loads((run.path / "environment.json").read_text())
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(config.name)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(config.name)}</h1>",
        f"<p class='muted'>{html.escape(config.model.backbone)} on {html.escape(config.data.name)}, protocol "
        f"{config.eval.protocol}, {steps:,} steps, {train_seconds:,.1f} s of training</p>",
        "<h2>Metrics</h2>",
        _metrics_table(metrics),
        "<h2>Curves</h2><div class='figures'>",
        _curves(lines, config),
        "</div><h2>Configuration</h2>",
        f"<pre>{html.escape(dump_config(config))}</pre>",
        "<h2>Machine</h2>",
        f"<pre>{html.escape(json.dumps(environment, indent=1))}</pre></html>",
    ]
    try:
        run.report_path.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{run.report_path}: cannot be written: {error}") from None


def _metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    head = "".join(f"<th>{html.escape(split)}</th>" for split in metrics)
    rows = (
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{values[name]:.4f}</td>" if name in values else "<td></td>" for values in metrics.values())
        + "</tr>"
        for name in names
    )
    return f"<table><tr><th>metric</th>{head}</tr>{''.join(rows)}</table>"


def _curves(lines: list[dict[str, Any]], config: Config) -> str:
    """One SVG: training loss, the selection metric, learning rate, speed."""
    train = [line for line in lines if line["split"] == "train" and "lr" in line]
    epochs = [line for line in lines if "epoch_loss" in line]
    valid = [line for line in lines if line["split"] == "valid"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    loss, quality, rate, speed = axes.flat
    loss.plot([x["step"] for x in train], [x["loss"] for x in train], color=_COLOURS["train"], lw=0.8, label="step")
    loss.plot(
        [x["step"] for x in epochs],
        [x["epoch_loss"] for x in epochs],
        "o-",
        ms=3,
        color=_COLOURS["epoch"],
        label="epoch",
    )
    loss.set_title("training loss")
    loss.legend(frameon=False)
    shown = dict.fromkeys([*(name for name in ("hr@10", "ndcg@10") if name in config.eval.metrics), config.eval.select])
    for name, style in zip(shown, ("o-", "s--", "^:"), strict=False):
        quality.plot([x["step"] for x in valid], [x[name] for x in valid], style, ms=3, label=name)
    quality.set_title("validation" if valid else f"no validation in protocol {config.eval.protocol}")
    if valid:
        quality.legend(frameon=False)
    rate.plot([x["step"] for x in train], [x["lr"] for x in train], color=_COLOURS["epoch"])
    rate.set_title("learning rate")
    speed.plot([x["step"] for x in train], [x["tokens_per_second"] for x in train], color=_COLOURS["epoch"], lw=0.8)
    speed.set_title("tokens a second")
    speed.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
