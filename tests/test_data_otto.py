"""OTTO's sessions: JSON lines, read in blocks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from test_data_recipes import sequences, store_of

from npu_rec.errors import DataError

T = 1659304800


def line(session: Any, *events: tuple[Any, Any, Any]) -> str:
    listed = [{"aid": aid, "ts": ts, "type": kind} for aid, ts, kind in events]
    return json.dumps({"session": session, "events": listed}, separators=(",", ":"))


LINES = [
    line(7, (0, T * 1000 + 999, "clicks"), (5, T * 1000 + 1000, "carts"), (5, T * 1000 + 1500, "orders")),
    line(2, (9, T * 1000, "clicks")),
    line(11, (3, T * 1000 + 2000, "clicks"), (0, T * 1000 + 1000, "clicks")),
]
SEQUENCES = {
    7: [(1, T, 0), (6, T + 1, 1), (6, T + 1, 2)],
    2: [(10, T, 0)],
    11: [(1, T + 1, 0), (4, T + 2, 0)],
}


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in lines))
    return path


@pytest.mark.parametrize("form", ["folder", "long name", "file", "gz", "crlf", "blocks"])
def test_otto(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "otto-recsys-train.jsonl" if form == "long name" else "train.jsonl"
    path = write_lines(tmp_path / "in" / name, LINES)
    if form == "gz":
        (path.parent / "train.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    elif form == "crlf":
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    elif form == "blocks":
        monkeypatch.setattr("npu_rec.data.textio.BLOCK_BYTES", 100)
    store = store_of("otto", path if form == "file" else path.parent, tmp_path)
    assert sequences(store) == SEQUENCES
    assert store.items["item_id"].to_pylist() == [1, 4, 6, 10]
    assert store.items["raw_id"].to_pylist() == ["0", "3", "5", "9"]
    assert store.manifest["action_values"] == ["clicks", "carts", "orders"]


MALFORMED = {
    '{"session":1,"events":[{"aid":3,"ts":16593': "is not JSON of a session, its number and its events",
    "[1, 2]": "is not JSON of a session, its number and its events",
    line("a", (1, T, "clicks")): "is not JSON of a session, its number and its events",
    '{"session":1,"events":[7]}': "is not JSON of a session, its number and its events",
    "null": "has no session from 0 to 2147483647",
    line(-4, (1, T, "clicks")): "has no session from 0 to 2147483647",
    line(2**31, (1, T, "clicks")): "has no session from 0 to 2147483647",
    '{"session":1}': "has no events",
    line(1): "has no events",
    line(1, (3, T, "clicks"), (-1, T, "clicks")): "has an event whose aid is not an integer from 0 to 2147483646",
    line(1, (3, T, "clicks"), (2**31 - 1, T, "clicks")): "has an event whose aid is not an integer from",
    line(1, (3, T, "clicks"), (None, T, "clicks")): "has an event whose aid is not an integer from 0 to 2147483646",
    line(1, (3, None, "carts")): "has an event whose ts is not a time in milliseconds since 1970",
    line(1, (3, T, "views")): "has an event whose type is not one of clicks, carts, orders",
    '{"session":1,"events":[{"aid":3,"ts":1659304800025}]}': "has an event whose type is not one of",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_session(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "in" / "train.jsonl", [*LINES[:2], text, LINES[2], text])
    shown = repr(text) if len(repr(text)) <= 60 else repr(text)[:57] + "..."
    with pytest.raises(DataError) as caught:
        store_of("otto", source, tmp_path)
    assert str(caught.value).startswith(f"train.jsonl: row 3, column session: {shown} {MALFORMED[text]}")
    monkeypatch.setattr("npu_rec.data.textio.BLOCK_BYTES", 300)
    store = store_of("otto", source, tmp_path, on_bad_row="drop")
    assert sequences(store) == SEQUENCES
    assert store.manifest["counts"]["bad_rows_dropped"] == 2


def test_empty_lines_and_repeated_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "in" / "train.jsonl", [LINES[0], "", LINES[1], LINES[0], "", ""])
    with pytest.raises(DataError, match=r"train.jsonl: row 2, column session: the value is missing"):
        store_of("otto", source, tmp_path)
    store = store_of("otto", source, tmp_path, on_bad_row="drop", duplicates="drop")
    assert sequences(store) == {user: SEQUENCES[user] for user in (7, 2)}
    monkeypatch.setattr("npu_rec.data.textio.BLOCK_BYTES", 100)
    with pytest.raises(DataError, match="a user stands in two"):
        store_of("otto", source, tmp_path / "blocks", on_bad_row="drop")
    with pytest.raises(DataError, match=r"not downloaded \(otto-recsys-train.jsonl"):
        store_of("otto", None, tmp_path)
    with pytest.raises(DataError, match=r"no train.jsonl or otto-recsys-train.jsonl there"):
        store_of("otto", tmp_path / "blocks", tmp_path)


def test_real_otto(real: Path, tmp_path: Path) -> None:
    folder = real / "multi-behavior" / "otto"
    sessions = [json.loads(text) for text in (folder / "train.jsonl").read_text().splitlines()]
    codes = {"clicks": 0, "carts": 1, "orders": 2}
    expected = {
        session["session"]: sorted(
            ((event["aid"] + 1, event["ts"] // 1000, codes[event["type"]]) for event in session["events"]),
            key=lambda event: event[1],
        )
        for session in sessions
    }
    store = store_of("otto", folder, tmp_path)
    assert sequences(store) == expected
    assert (store.num_sequences, store.num_events) == (20, 862)
