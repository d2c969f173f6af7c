"""The synthetic stream: reproducible, and distributed as documented."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_data_recipes import sequences, store_of

from npu_rec.data.recipes.synthetic import Synthetic, SyntheticOptions
from npu_rec.errors import ConfigError


def test_synthetic_is_the_same_however_it_is_cut_up() -> None:
    recipe = Synthetic(SyntheticOptions(users=50, length=20, items=300, categories=10, seed=3))
    whole = recipe.records(0, 50)
    pieces = [recipe.records(a, b) for a, b in ((0, 1), (1, 7), (7, 50))]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert not np.array_equal(
        whole, Synthetic(SyntheticOptions(users=50, length=20, items=300, categories=10)).records(0, 50)
    )


def test_synthetic_vocabulary_grows() -> None:
    options = SyntheticOptions(users=2000, length=64, items=2000, categories=20)
    recipe = Synthetic(options)
    ids = recipe.records(0, options.users)
    limits = ((0.4 + 0.6 * np.arange(options.users) / options.users) * options.items).astype(int)
    assert ids.min() == 1
    assert (ids.max(axis=1) <= limits).all()
    assert ids[-400:].max() > 0.9 * options.items
    categories = recipe.category[ids - 1]
    assert max(len(set(row)) for row in categories.tolist()) == 5
    # Within a category every available item is as likely as another.
    early = ids[(categories == categories[0, 0]) & (ids <= 800)]
    counts = np.bincount(early)[np.flatnonzero(recipe.category[:800] == categories[0, 0]) + 1]
    assert counts.std() < 2 * np.sqrt(counts.mean())


@pytest.mark.parametrize("concentration", [0.5, 3.0, 500.0])
def test_synthetic_concentration(concentration: float) -> None:
    """Events n and m share a category with probability 1/(1+a) + a/(1+a) E[sum p^2] in a Dirichlet process with the
    base p; for p uniform on the k-simplex E[sum p^2] = 2/(k+1), and k is uniform on 1..5."""
    options = SyntheticOptions(users=8000, length=24, categories=20, concentration=(concentration, concentration))
    recipe = Synthetic(options)
    categories = recipe.category[recipe.records(0, options.users) - 1]
    base = np.mean([2 / (k + 1) for k in range(1, 6)])
    expected = (1 + concentration * base) / (1 + concentration)
    for n, m in ((0, 1), (0, 23), (11, 12)):
        assert (categories[:, n] == categories[:, m]).mean() == pytest.approx(expected, abs=0.02)


def test_synthetic_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"users": 30, "length": 16, "items": 100, "categories": 7, "seed": 1}
    store = store_of("synthetic", None, tmp_path / "a", options=options)
    assert (store.num_sequences, store.num_events, store.num_items) == (30, 480, 100)
    assert store.gather([29], [0], [1]).times == 29 * 16
    assert store.items["category"].to_pylist() == Synthetic(SyntheticOptions(**options)).category.tolist()
    monkeypatch.setattr("npu_rec.data.recipes.synthetic.CHUNK_USERS", 7)
    assert sequences(store_of("synthetic", None, tmp_path / "b", options=options)) == sequences(store)
    with pytest.raises(ConfigError, match="reads no source"):
        store_of("synthetic", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="max_user_categories cannot exceed"):
        store_of("synthetic", None, tmp_path, options={"categories": 2})
