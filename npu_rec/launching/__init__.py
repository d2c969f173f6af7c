"""Starts training on a cluster: renders the templates of launch/ and hands them to a scheduler (docs/launch.md)."""

from npu_rec.launching.job import Job, Launch
from npu_rec.launching.schedulers import SCHEDULERS, render_launch
from npu_rec.launching.submit import submit

__all__ = ["SCHEDULERS", "Job", "Launch", "render_launch", "submit"]
