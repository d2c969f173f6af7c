"""The built-in recipes, one data set or family a file; importing this package registers them."""

from npu_rec.data.recipes import (
    amazon,
    interactions,
    kuairand,
    ml_100k,
    movielens,
    otto,
    retailrocket,
    sasrec,
    synthetic,
)

__all__ = ["amazon", "interactions", "kuairand", "ml_100k", "movielens", "otto", "retailrocket", "sasrec", "synthetic"]
