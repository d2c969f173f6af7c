"""KuaiRand: short videos that were shown, and what viewers did with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
from pydantic import Field

from npu_rec.config import Section
from npu_rec.data.checks import once
from npu_rec.data.kinds import Choice, Feature, Id, Seconds
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import ROW, Column, Rows
from npu_rec.data.sources import find, is_archive, matching
from npu_rec.data.textio import TextFormat
from npu_rec.errors import DataError
from npu_rec.registry import register

BITS = {
    "is_click": 1,
    "is_like": 2,
    "is_follow": 4,
    "is_comment": 8,
    "is_forward": 16,
    "is_hate": 32,
    "long_view": 64,
    "is_profile_enter": 128,
}
_CSV = TextFormat(",", quoted=True)


class KuaiRandOptions(Section):
    """What is read."""

    random: bool = Field(False, description="Read `log_random_*.csv` too: videos that were put in at random.")


@register("data", "kuairand", options=KuaiRandOptions)
class KuaiRand(Recipe):
    """Reads `log_standard_*.csv` of KuaiRand-Pure, -1K or -27K, and features of users and videos where there are any.

    Logs are read by date and part, and a user's events are sorted by time over all of them. Videos count from 0, so
    item ids are `video_id` + 1. The catalogue is the videos of the features and those of the logs.
    """

    description = (
        "KuaiRand short videos (Pure, 1K, 27K): 1.4, 11.7 or 322 million exposures with eight kinds of feedback"
    )
    terms = "KuaiRand, Kuaishou and USTC: CC BY-SA 4.0; cite Gao et al. 2022, doi 10.1145/3511808.3557624."
    where = "KuaiRand-Pure, -1K or -27K: kuairand.com"
    actions = "sum of " + ", ".join(f"{name} {bit}" for name, bit in BITS.items())
    options: KuaiRandOptions

    def inputs(self, source: Path) -> list[Path]:
        if is_archive(source):
            return [source]
        logs, *features = self._files(source)
        return [*logs, *(path for path in features if path is not None)]

    def _files(self, source: Path) -> tuple[list[Path], Path | None, Path | None]:
        """The logs in order, features of users, features of videos."""
        logs = [source] if source.is_file() else _logs(source, "standard")
        if self.options.random:
            logs += _logs(source, "random")
        versions = {"".join(re.findall(r"_(?:pure|1k|27k)(?=[_.])", path.name)) for path in logs}
        if len(versions) > 1:
            raise DataError(f"{source}: logs of several versions, {', '.join(sorted(versions))}; keep them apart")
        (version,) = versions
        users, videos = (f"{name}{version}.csv" for name in ("user_features", "video_features_basic"))
        return logs, find(source, users, folder="data"), find(source, videos, folder="data")

    def read(self, source: Path, rows: Rows) -> RawData:
        logs, users, videos = self._files(source)
        events = pl.concat([_log(path, rows) for path in logs])
        return RawData(
            events,
            items=None if videos is None else _videos(videos, events, rows),
            users=None if users is None else rows.text(users, _keyed("user", "user_id"), _CSV),
            item_offset=1,
            events_file=logs[0].name if len(logs) == 1 else "the logs",
        )


def _logs(source: Path, kind: str) -> list[Path]:
    logs = matching(source, f"log_{kind}_*.csv", folder="data")
    if not logs:
        raise DataError(f"{source}: no log_{kind}_*.csv there (events are in it); data.source names its folder")
    return logs


def _log(path: Path, rows: Rows) -> pl.DataFrame:
    flags = [Column(name, Choice(("0", "1"))) for name in BITS]
    columns = [
        Column("user", Id(), source="user_id"),
        Column("item", Id(), source="video_id"),
        Column("time", Seconds("ms"), source="time_ms"),
        *flags,
    ]
    action = pl.sum_horizontal(pl.col(name) * bit for name, bit in BITS.items()).alias("action")
    frames = rows.stream(path, columns, TextFormat(","))  # by block, since the flags are twice what stays
    return pl.concat([frame.select("user", pl.col("item") + 1, "time", action) for frame in frames])


def _videos(path: Path, events: pl.DataFrame, rows: Rows) -> pl.DataFrame:
    """Listed videos with their features, then those that only the logs have."""
    listed = once(rows, rows.text(path, _keyed("item", "video_id"), _CSV), "item", path.name)
    listed = listed.drop(ROW).with_columns(pl.col("item") + 1)
    others = events.select(pl.col("item").unique()).join(listed, on="item", how="anti")
    if others.height:
        rows.log(f"{path.name}: {others.height} videos of the logs are not listed there")
    return pl.concat([listed, others], how="diagonal")


def _keyed(key: str, id_name: str) -> Callable[[list[str]], list[Column]]:
    """The id and all other columns, as features."""
    return lambda names: [
        Column(key, Id(), id_name),
        *(Column(name, Feature()) for name in names if name != id_name),
    ]
