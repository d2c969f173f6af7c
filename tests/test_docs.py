"""The documentation says what the code does: commands parse, keys and files exist, links resolve, examples run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from conftest import REPOSITORY, npu_rec_json

from npu_rec.cli import app
from npu_rec.config import Config, load_config, validate
from npu_rec.data.recipes.interactions import InteractionsOptions
from npu_rec.ops import OPERATORS
from npu_rec.registry import lookup, names

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
importlib.import_module("npu_rec.train")  # the built-in components register
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_FENCE = re.compile(r"^([ ]*)```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?:^|\s)(?:npu-rec|python -m npu_rec)(?=\s|$)(.*)")


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language, title and text of the fenced blocks."""
    for indent, language, title, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        yield language, title, re.sub(f"^{indent}", "", body, flags=re.MULTILINE)


def spans(page: Path) -> list[str]:
    """Inline code."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]


def resolve(arguments: list[str]) -> tuple[typer.main.TyperCommand, list[str]]:  # type: ignore[name-defined]
    """The command that arguments lead to, and what is left for it."""
    command, rest = typer.main.get_command(app), list(arguments)
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for argument in rest:
        name = argument.partition("=")[0]
        assert not name.startswith("--") or name in known | {"--help"}, f"{command.name} has no option {name}"
    return command, rest


@each_page
def test_command_lines_parse(page: Path) -> None:
    for language, title, body in blocks(page):
        if language not in ("", "sh", "bash", "console") or title:
            continue
        for line in body.replace("\\\n", " ").splitlines():
            for text in _COMMAND.findall(line.partition(" #")[0]):
                command, rest = resolve(shlex.split(text))
                if "--help" in rest or hasattr(command, "commands"):
                    continue
                context = command.make_context(command.name, list(rest))  # raises for what does not parse
                load_config(REPOSITORY / "configs" / "base.yaml", context.params.get("set_"))
    for span in spans(page):
        for text in _COMMAND.findall(span):
            resolve(shlex.split(text))


@each_page
def test_named_configurations_exist(page: Path) -> None:
    for name in re.findall(r"\bconfigs/[\w./-]+\.ya?ml\b", page.read_text(encoding="utf-8")):
        assert (REPOSITORY / name).is_file(), name


@each_page
def test_configuration_examples_and_keys_are_valid(page: Path) -> None:
    for language, _, body in blocks(page):
        if language == "yaml":
            example = yaml.safe_load(body)
            example.pop("base", None)
            config = validate(Config, example, {})
            if config.data.name == "interactions":
                InteractionsOptions.model_validate(config.data.options)
    for span in spans(page):
        match = re.fullmatch(r"(\w+)\.(\w+)(?:\.(\w+))?(?:: .+|=.+)?", span)
        if match is None or match[1] not in Config.model_fields or page.name == "configuration.md":
            continue
        fields = Config.model_fields[match[1]].annotation.model_fields  # type: ignore[union-attr]
        assert match[2] in fields, f"no key {span}"
        if match[3]:
            sections = [fields[match[2]].annotation]
            if match[2] == "options":
                sections = [lookup(match[1], name).options for name in names(match[1])]  # type: ignore[arg-type]
            assert any(match[3] in getattr(section, "model_fields", {}) for section in sections), f"no key {span}"


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    lines = [line for language, _, body in blocks(page) if not language for line in body.splitlines()]
    for text in [*lines, *spans(page)]:
        match = re.match(r"make ([a-z]+)\b", text)
        assert match is None or match[1] in targets, text


def anchors(page: Path) -> set[str]:
    """Ids of the headings, as mkdocs makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = (title.strip().lower() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title)) for title in titles}


@each_page
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"`[^`]+`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_menu_names_every_page() -> None:
    menu = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    assert {name for entry in menu for name in entry.values()} == {page.name for page in DOCS.glob("*.md")}


def test_configuration_page_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == generate.render(), "run python docs/generate.py"


@each_page
def test_python_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_REC_HOME", str(tmp_path))
    for language, title, body in blocks(page):
        if language == "python" and not title:
            code = compile(body, str(page), "exec")
            if page.name in ("data.md", "devices.md"):
                exec(code, {})


def test_every_operator_and_backend_is_described() -> None:
    lines = [line for line in (DOCS / "operators.md").read_text().splitlines() if line.startswith("| `")]
    described = {re.findall(r"`(\w+)`", line)[0]: re.findall(r"`(\w+)`", line.split("|")[3]) for line in lines}
    own = {
        name: [b.name for b in operator.backends if b.forward.__module__.startswith("npu_rec.")]
        for name, operator in OPERATORS.items()
    }
    assert described == own


def write_examples(page: Path, folder: Path) -> None:
    """Each block that has a title, as a file of that name."""
    for _, title, body in blocks(page):
        if title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(body, encoding="utf-8")


def test_operator_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(DOCS / "operators.md", tmp_path)
    operator = OPERATORS["norm_gate"]
    monkeypatch.setattr(operator, "backends", list(operator.backends))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        runpy.run_path(str(tmp_path / "check_my_norm_gate.py"))
    finally:
        sys.modules.pop("my_norm_gate", None)
    assert operator.backends[0].name == "closed_form"


def test_extension_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(DOCS / "extending.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("make_sales.py")
    environment = {"NPU_REC_HOME": str(tmp_path / "home")}
    document = npu_rec_json("train", "shop.yaml", cwd=tmp_path, env=environment)
    assert document["metrics"]["test"].keys() == {"hr@10", "ndcg@10", "linear@10"}
    assert (tmp_path / document["checkpoint"] / "manifest.json").is_file()


def test_extension_example_by_entry_point(tmp_path: Path) -> None:
    write_examples(DOCS / "extending.md", tmp_path)
    (toml,) = (body for language, _, body in blocks(DOCS / "extending.md") if language == "toml")
    group = re.search(r"entry-points\.(\w+)\]", toml)
    assert group is not None
    info = tmp_path / "my_shop-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_shop\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group[1]}]\n{toml.partition(']')[2].strip().replace(chr(34), '')}\n")
    listed = npu_rec_json("data", "list", cwd=tmp_path)
    assert "my-shop" in {recipe["name"] for recipe in listed}
