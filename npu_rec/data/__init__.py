"""Data sets: recipes that obtain, check and convert them, and the store that reads them.

Importing this package registers the built-in recipes.
"""

from npu_rec.data import recipes as recipes
from npu_rec.data.download import Log
from npu_rec.data.kinds import Choice, Feature, HalfStars, Id, Integer, Kind, Problem, RawId, Seconds, Text
from npu_rec.data.prepare import data_dir, prepare
from npu_rec.data.recipe import RawData, Recipe
from npu_rec.data.rows import ROW, Column, Rows
from npu_rec.data.store import Events, SequenceStore
from npu_rec.data.textio import TextFormat

__all__ = [
    "ROW",
    "Choice",
    "Column",
    "Events",
    "Feature",
    "HalfStars",
    "Id",
    "Integer",
    "Kind",
    "Log",
    "Problem",
    "RawData",
    "RawId",
    "Recipe",
    "Rows",
    "Seconds",
    "SequenceStore",
    "Text",
    "TextFormat",
    "data_dir",
    "prepare",
]
