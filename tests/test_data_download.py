"""Downloads from a loopback server and from a folder of wheels: verified, reused, refused."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from test_data_recipes import ML_1M, ML_100K_GROUPLENS, ML_100K_RECBOLE, sequences, store_of

from npu_rec.config import DataConfig
from npu_rec.data import prepare
from npu_rec.data.recipes.ml_100k import MovieLens100K
from npu_rec.data.recipes.movielens import MovieLens1M
from npu_rec.errors import DataError


class Files(http.server.BaseHTTPRequestHandler):
    """Serves a dictionary; a value may claim more bytes than it has."""

    content: ClassVar[dict[str, bytes]] = {}
    claimed: ClassVar[dict[str, int]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.content.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.claimed.get(self.path, len(body))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A loopback server that has ml-1m.zip and its checksum; the recipes' addresses lead there."""
    archive = tmp_path / "ml.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name, text in ML_1M.items():
            packed.writestr(f"ml-1m/{name.replace('_', '.')}", text.encode("latin-1"))
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    checksum = f"MD5 (ml-1m.zip) = {digest}\n".encode()
    monkeypatch.setattr(Files, "content", {"/ml-1m.zip": archive.read_bytes(), "/ml-1m.zip.md5": checksum})
    monkeypatch.setattr(Files, "claimed", {})
    monkeypatch.setattr(Files, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(MovieLens1M, "url", f"{url}/ml-1m.zip")
        monkeypatch.setattr(MovieLens100K, "url", f"{url}/ml-100k.zip")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield url
        running.shutdown()


def test_download_is_verified_and_used_again(tmp_path: Path, server: str) -> None:
    lines: list[str] = []
    store = store_of("ml-1m", None, tmp_path / "out", lines.append)
    assert len(sequences(store)) == 2
    assert any("no redistribution" in line for line in lines)
    assert any(f"downloading from {server}/ml-1m.zip" in line for line in lines)
    assert Files.asked == ["/ml-1m.zip.md5", "/ml-1m.zip"]
    prepare(DataConfig(name="ml-1m", dir=tmp_path / "out"), log=lines.append)  # prepared: nothing to do
    prepare(DataConfig(name="ml-1m", dir=tmp_path / "out"), refresh=True, log=lines.append)  # downloaded: read again
    assert len(Files.asked) == 2
    archive = tmp_path / "out" / "downloads" / "ml-1m.zip"
    archive.write_bytes(archive.read_bytes()[:-1])
    prepare(DataConfig(name="ml-1m", dir=tmp_path / "out"), refresh=True, log=lines.append)
    assert any("the earlier download is damaged" in line for line in lines)
    assert len(Files.asked) == 4
    assert not list((tmp_path / "out").rglob(".*"))  # no temporary names left


def test_download_failures(tmp_path: Path, server: str) -> None:
    body = Files.content["/ml-1m.zip"]
    Files.content["/ml-1m.zip"] = body[:-1] + b"?"
    with pytest.raises(DataError, match="checksum mismatch: the publisher's MD5 is"):
        store_of("ml-1m", None, tmp_path)
    Files.claimed["/ml-1m.zip"] = len(body) + 10
    with pytest.raises(DataError, match=rf"ml-1m.zip: .*(closed after {len(body)} of|IncompleteRead)"):
        store_of("ml-1m", None, tmp_path)
    Files.content["/ml-1m.zip.md5"] = b"<html>"
    with pytest.raises(DataError, match="no MD5 checksum in it"):
        store_of("ml-1m", None, tmp_path)
    del Files.content["/ml-1m.zip.md5"]
    with pytest.raises(DataError, match=r"md5: cannot be downloaded: HTTP 404 Not Found; a copy .* data.source"):
        store_of("ml-1m", None, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or ".tmp" in path.name]
    assert not (tmp_path / "downloads" / "ml-1m.zip").exists()


def wheel(folder: Path) -> Path:
    """A wheel with RecBole's name and layout."""
    folder.mkdir()
    path = folder / "recbole-1.2.1-py3-none-any.whl"
    info = "recbole-1.2.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in ML_100K_RECBOLE.items():
            file = name.replace("__", "-").replace("_", ".")
            archive.writestr(f"recbole/dataset_example/ml-100k/{file}", text)
        archive.writestr("recbole/__init__.py", "raise SystemExit('installed or imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_ml_100k_from_the_wheel(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(tmp_path / "links")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setattr(MovieLens100K, "wheel_sha256", hashlib.sha256(path.read_bytes()).hexdigest())
    store = store_of("ml-100k", None, tmp_path / "a")
    assert sequences(store)[186] == [(267, 891717742, 6)]
    assert Files.asked == []

    # Another digest: GroupLens' archive is tried, and both reasons are told.
    monkeypatch.setattr(MovieLens100K, "wheel_sha256", "0" * 64)
    with pytest.raises(DataError, match=r"First way: .*mismatch: expected SHA-256 0000.*Second way: .*HTTP 404"):
        store_of("ml-100k", None, tmp_path / "b")
    with zipfile.ZipFile(tmp_path / "u.zip", "w") as archive:
        for name, text in ML_100K_GROUPLENS.items():
            archive.writestr(f"ml-100k/{name.replace('_', '.')}", text)
    body = (tmp_path / "u.zip").read_bytes()
    Files.content |= {"/ml-100k.zip": body, "/ml-100k.zip.md5": hashlib.md5(body).hexdigest().encode()}
    fallback = store_of("ml-100k", None, tmp_path / "b")
    assert sequences(fallback) == sequences(store)
