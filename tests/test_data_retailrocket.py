"""RetailRocket: the publisher's file, and the cleaned copy with a file of each behaviour."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_data_recipes import sequences, store_of, write

from npu_rec.errors import ConfigError, DataError

EVENTS = (
    "timestamp,visitorid,event,itemid,transactionid\n"
    "1433221332117,257597,view,355908,\n"
    "1433224214164,0,addtocart,248676,\n"
    "1433221999827,0,view,248676,\n"
    "1433224214999,0,transaction,248676,4000\n"
    "1433221955914,257597,view,248676,\n"
)
COPY = {
    "view_ecommerce.dat": "visitorid\titemid\tevent\n1\t1\t1\n1\t2\t1\n2\t2\t1\n",
    "add_to_cart_ecommerce.dat": "visitorid\titemid\tevent\n1\t2\t1\n",
    "purchase_ecommerce.dat": "visitorid\titemid\tevent\n1\t2\t1\n2\t4\t1\n",
}


def copy_of(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in {**COPY, **files}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("form", ["folder", "file", "zip"])
def test_published_events(tmp_path: Path, form: str) -> None:
    source = write(tmp_path / "in", events_csv=EVENTS)
    if form == "file":
        source = source / "events.csv"
    elif form == "zip":
        with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
            archive.writestr("events.csv", EVENTS)
            archive.writestr("category_tree.csv", "categoryid,parentid\n")
        source = tmp_path / "archive.zip"
    store = store_of("retailrocket", source, tmp_path)
    assert sequences(store) == {
        "257597": [(1, 1433221332, 0), (2, 1433221955, 0)],
        "0": [(2, 1433221999, 0), (2, 1433224214, 1), (2, 1433224214, 2)],
    }
    assert store.items["raw_id"].to_pylist() == ["355908", "248676"]
    assert store.manifest["action_values"] == ["view", "addtocart", "transaction"]


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_copy_by_behaviour(tmp_path: Path, form: str) -> None:
    folder = copy_of(tmp_path / "in")
    store = store_of("retailrocket", folder / "view_ecommerce.dat" if form == "file" else folder, tmp_path)
    assert sequences(store) == {1: [(1, 0), (2, 0), (2, 1), (2, 2)], 2: [(2, 0), (4, 2)]}
    assert not store.has_times
    assert store.num_items == 4


def test_behaviours_that_are_kept_stay_the_same_actions(tmp_path: Path) -> None:
    options = {"behaviours": ["transaction", "addtocart"]}
    folder = copy_of(tmp_path / "copy")
    (folder / "view_ecommerce.dat").unlink()  # not needed
    store = store_of("retailrocket", folder, tmp_path, options=options)
    assert sequences(store) == {1: [(2, 1), (2, 2)], 2: [(4, 2)]}
    lines: list[str] = []
    published = write(tmp_path / "in", events_csv=EVENTS)
    store = store_of("retailrocket", published, tmp_path, lines.append, options=options)
    assert sequences(store) == {"0": [(1, 1433224214, 1), (1, 1433224214, 2)]}
    assert "retailrocket: the recipe's filter took 3 of 5 events out" in lines
    with pytest.raises(ConfigError, match=r"data.options.behaviours"):
        store_of("retailrocket", published, tmp_path, options={"behaviours": ["click"]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1433224214164,0,click,248676,", ", column event: 'click' is not one of view, addtocart, transaction"),
        ("1433224214164,0,view,,", ", column itemid: the value is missing"),
        ("yesterday,0,view,3,", ", column timestamp: 'yesterday' is not a number"),
        ("1433224214164,0,view,3", ": 4 fields, expected 5"),
    ],
)
def test_malformed_events(tmp_path: Path, row: str, expected: str) -> None:
    source = write(tmp_path / "in", events_csv=f"{EVENTS}{row}\n")
    with pytest.raises(DataError) as caught:
        store_of("retailrocket", source, tmp_path)
    assert str(caught.value).startswith(f"events.csv: row 7{expected}")
    assert store_of("retailrocket", source, tmp_path, on_bad_row="drop").num_events == 5


def test_malformed_and_missing_files_of_the_copy(tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "in", **{"purchase_ecommerce.dat": "visitorid\titemid\tevent\n1\t0\t1\n"})
    with pytest.raises(DataError, match=r"purchase_ecommerce.dat: row 2, column itemid: '0' is the id that stands for"):
        store_of("retailrocket", folder, tmp_path)
    (folder / "purchase_ecommerce.dat").unlink()
    with pytest.raises(DataError, match=r"no purchase_ecommerce.dat there \(it holds the behaviour transaction in"):
        store_of("retailrocket", folder, tmp_path)
    with pytest.raises(DataError, match=r"not downloaded \(events.csv: www.kaggle.com"):
        store_of("retailrocket", None, tmp_path)


def test_real_copy(real: Path, tmp_path: Path) -> None:
    folder = real / "multi-behavior" / "retailrocket"
    store = store_of("retailrocket", folder, tmp_path)
    assert (store.num_sequences, store.num_events, store.num_items) == (3431, 92_487, 8885)
    assert store.manifest["counts"]["duplicates"] == 0
    everything = np.arange(len(store))
    actions = store.gather(everything, np.zeros_like(everything), store.lengths).actions
    assert actions is not None
    assert np.bincount(actions).tolist() == [78_371, 9028, 5088]
    carts = pl.read_csv(folder / "add_to_cart_ecommerce.dat", separator="\t")
    only = store_of("retailrocket", folder, tmp_path, options={"behaviours": ["addtocart"]})
    everything = np.arange(len(only))
    items = only.gather(everything, np.zeros_like(everything), only.lengths).item_ids
    assert np.array_equal(items, carts["itemid"].to_numpy())
