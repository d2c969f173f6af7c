"""Amazon Video Games as SASRec's authors preprocessed it."""

from __future__ import annotations

from pathlib import Path

from npu_rec.data.kinds import Id
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import Column, Rows
from npu_rec.data.sources import is_archive, need
from npu_rec.data.textio import TextFormat
from npu_rec.registry import register


@register("data", "amazon-games")
class AmazonGames(Recipe):
    """Reads `Video.txt`: lines `user item`, a user's in the order of time, and no times. Ids are used as they are."""

    description = "Amazon Video Games 2014 as used by SASRec: 287,107 reviews of 23,715 items by 31,013 users, no times"
    terms = (
        "Amazon product data 2014, J. McAuley, UCSD: for research; cite He and McAuley 2016, "
        "doi 10.1145/2872427.2883037, and for the preprocessing Kang and McAuley 2018, arXiv 1808.09781."
    )
    where = "Video.txt, which SASRec's authors preprocessed from Amazon's video games: github.com/kang205/SASRec, data/"
    members = ("Video.txt",)
    published_events = 287_107

    def inputs(self, source: Path) -> list[Path]:
        return [source if is_archive(source) else self._events(source)]

    def _events(self, source: Path) -> Path:
        return source if source.is_file() else need(source, "Video.txt", why="it holds the events")

    def read(self, source: Path, rows: Rows) -> RawData:
        path = self._events(source)
        columns = [Column("user", Id()), Column("item", Id(zero_is_padding=True))]
        return RawData(rows.text(path, columns, TextFormat(" ", names=("user", "item"))), events_file=path.name)
