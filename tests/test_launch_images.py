"""The Dockerfiles parse, take what exists, and name versions. No image is built here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from dockerfile_parse import DockerfileParser

IMAGES = sorted((REPOSITORY / "launch" / "images").glob("Dockerfile.*"))
each_image = pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.suffix[1:])


def parsed(path: Path, tmp_path: Path) -> DockerfileParser:
    parser = DockerfileParser(str(tmp_path), cache_content=False)
    parser.content = path.read_text()
    return parser


def instructions(path: Path, tmp_path: Path, name: str) -> list[str]:
    structure: list[dict[str, Any]] = parsed(path, tmp_path).structure
    return [entry["value"] for entry in structure if entry["instruction"] == name]


def test_there_is_one_for_each_device() -> None:
    assert [path.suffix for path in IMAGES] == [".ascend", ".cpu", ".cuda"]


@each_image
def test_every_source_that_is_copied_exists(path: Path, tmp_path: Path) -> None:
    copies = instructions(path, tmp_path, "COPY")
    assert copies
    for copy in copies:
        *sources, _ = copy.split()
        assert all((REPOSITORY / source).exists() for source in sources)


@each_image
def test_what_setup_needs_is_copied(path: Path, tmp_path: Path) -> None:
    """The links npu_rec/kernels, npu_rec/configs, npu_rec/launch lead to folders beside the package."""
    copied = {word for copy in instructions(path, tmp_path, "COPY") for word in copy.split()[:-1]}
    links = {(REPOSITORY / "npu_rec" / name).readlink().name for name in ("kernels", "configs", "launch")}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "npu_rec"} | links <= copied


@each_image
def test_versions_are_named(path: Path, tmp_path: Path) -> None:
    parser = parsed(path, tmp_path)
    tag = parser.baseimage.rpartition(":")[2]
    assert re.match(r"\d+\.\d+", tag), parser.baseimage
    assert "latest" not in path.read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    (torch,) = set(re.findall(r"\btorch==(\d[\d.]*)", path.read_text()))
    assert f"torch=={torch}" in makefile


@each_image
def test_the_compiler_is_there_before_the_package(path: Path, tmp_path: Path) -> None:
    """The C++ kernels are built with torch at hand: compiler, torch, then the package without build isolation."""
    text = path.read_text()
    places = [text.index(word) for word in ("build-essential", "torch==", "pip install --no-build-isolation .")]
    assert places == sorted(places)
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]["requires"]
    assert all(f'"{name}"' in text for name in wanted)
