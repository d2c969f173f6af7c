"""Downloads: to a temporary name, verified, then renamed; an archive that is there and intact is used again."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from npu_rec.errors import DataError

TIMEOUT_SECONDS = 15  # to connect, and between two pieces
_WHEEL_SECONDS = 600
_REPORT_SECONDS = 5

Log = Callable[[str], None]


def download(url: str, folder: Path, log: Log, *, md5_url: str | None = None) -> Path:
    """Download a file into the folder and verify it.

    Args:
        md5_url: the publisher's checksum file; None where there is none, then only the length is checked.

    Raises:
        DataError: when the server cannot be reached, the transfer breaks or the checksum differs.
    """
    target = folder / url.rpartition("/")[2]
    digest_file = folder / f"{target.name}.md5"
    if target.is_file() and digest_file.is_file():
        if file_digest(target, "md5") == digest_file.read_text().strip():
            log(f"{target.name}: downloaded before, intact")
            return target
        log(f"{target.name}: the earlier download is damaged; downloading it again")
    expected = _published_md5(md5_url) if md5_url else None
    with _temporary(folder, target.name) as partial:
        _transfer(url, partial, log)
        found = file_digest(partial, "md5")
        if expected is not None and found != expected:
            raise DataError(f"{url}: checksum mismatch: the publisher's MD5 is {expected}, the download's is {found}")
        # The digest goes first: a kill between the two leaves an archive that is fetched again, never a wrong one.
        digest_file.unlink(missing_ok=True)
        os.replace(partial, target)
        digest_file.write_text(found)
    return target


def download_wheel(requirement: str, file: str, sha256: str, folder: Path, log: Log) -> Path:
    """Download a wheel with pip, from wherever this machine's pip is set up to look, without installing it.

    Args:
        requirement: `name==version`.
        file: name of the wheel.
        sha256: its digest.

    Raises:
        DataError: when pip cannot get it or the digest differs.
    """
    target = folder / file
    if target.is_file() and file_digest(target, "sha256") == sha256:
        log(f"{file}: downloaded before, intact")
        return target
    log(f"{file}: downloading with pip")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--ignore-requires-python", "--timeout", str(TIMEOUT_SECONDS), "--retries", "1"]
        try:
            done = subprocess.run(
                [*command, "--dest", scratch, requirement], capture_output=True, text=True, timeout=_WHEEL_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"{requirement}: pip took more than {_WHEEL_SECONDS} s") from None
        found = Path(scratch) / file
        if done.returncode or not found.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise DataError(f"{requirement}: pip cannot download it: {reason}")
        digest = file_digest(found, "sha256")
        if digest != sha256:
            raise DataError(f"{file}: checksum mismatch: expected SHA-256 {sha256}, the download's is {digest}")
        os.replace(found, target)
    return target


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{os.getpid()}-{name}"
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _open(url: str) -> Iterator[http.client.HTTPResponse]:
    request = urllib.request.Request(url, headers={"User-Agent": "npu-rec"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            yield response
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        code = f"HTTP {error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise DataError(
            f"{url}: cannot be downloaded: {code}{reason}; a copy from elsewhere can be given with data.source"
        ) from None


def _transfer(url: str, target: Path, log: Log) -> None:
    name = url.rpartition("/")[2]
    with _open(url) as response, target.open("wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        size = f" of {length / 1e6:.1f} MB" if length else " MB"
        log(f"{name}: downloading from {url}{f' ({length / 1e6:.1f} MB)' if length else ''}")
        received, reported = 0, time.monotonic()
        while piece := response.read(2**20):
            file.write(piece)
            received += len(piece)
            if time.monotonic() - reported > _REPORT_SECONDS:
                log(f"{name}: {received / 1e6:.1f}{size}")
                reported = time.monotonic()
    if length and received != length:
        raise DataError(f"{url}: the connection closed after {received} of {length} bytes; try again")


def _published_md5(url: str) -> str:
    with _open(url) as response:
        text = response.read(4096).decode("ascii", errors="replace")
    found = re.search(r"\b[0-9a-fA-F]{32}\b", text)
    if found is None:
        raise DataError(f"{url}: no MD5 checksum in it: {text[:80]!r}")
    return found[0].lower()
