"""Scaling studies: sweeps over configurations, fits of scaling laws, plots and a report."""

from npu_rec.scaling.report import Report, points_table, write_report
from npu_rec.scaling.results import failed_rows, finished_rows, read_results
from npu_rec.scaling.study import Study, load_study
from npu_rec.scaling.sweep import run_sweep

__all__ = [
    "Report",
    "Study",
    "failed_rows",
    "finished_rows",
    "load_study",
    "points_table",
    "read_results",
    "run_sweep",
    "write_report",
]
