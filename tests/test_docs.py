"""README and docs: generated pages are up to date, links lead somewhere, and the command lines shown are valid."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import typer.main
from conftest import call, write_rows

import qunlearn
from qunlearn.cli.app import app
from qunlearn.sandbox import data_file

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guide").glob("*.md"))
PAGES = [README, *sorted(DOCS.rglob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
# The pages that a user reads first; the others are generated, or records of their day.
WRITTEN = [README, *GUIDES, *(DOCS / f"{name}.md" for name in ("index", "results", "limits"))]

MOST_LINES, MOST_COLUMNS = 140, 160
OLD_WORDS = ("gone on with", "go on with", "end to end", "closed up", "has no say", "hears", "heard", "cards")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- generated pages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    """tools/docs.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("tools_docs", ROOT / "tools" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(docs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check"]) == 0, capsys.readouterr().err


def test_the_check_names_the_page_that_differs(
    docs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "docs" / "reference" / "cli.md"
    monkeypatch.setattr(docs, "pages", lambda root: {page: "new\n"})
    assert docs.main(["--check"], tmp_path) == 1
    assert "docs/reference/cli.md" in capsys.readouterr().err
    assert not page.exists()
    assert docs.main([], tmp_path) == 0
    assert page.read_text(encoding="utf-8") == "new\n"
    assert docs.main(["--check"], tmp_path) == 0


def test_the_reference_has_every_command_and_setting() -> None:
    from qunlearn.config.settings import SETTINGS

    commands = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    for name in ("forget", "plan", "merge", "eval", "data import", "recipe run"):
        assert f"\n## qunlearn {name}\n" in commands
    settings = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    for setting in SETTINGS.values():
        assert f"| `{setting.key}` |" in settings
        assert setting.flag is None or f"`{setting.flag}`" in commands


# -- links -----------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.M):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").lower()
        base = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        number, slug = 0, base
        while slug in found:
            number += 1
            slug = f"{base}-{number}"
        found.add(slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_on_the_map() -> None:
    index = DOCS / "index.md"
    reached = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(index))}
    assert set(PAGES) - {index} <= reached


# -- form ------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_lines_are_short_and_words_are_the_fields(page: Path) -> None:
    text = prose(page)
    for line in text.splitlines():
        assert len(line) <= MOST_COLUMNS or line.startswith("|"), line
    for word in OLD_WORDS:
        assert not re.search(rf"\b{word}\b", text, re.I), word


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = page.read_text(encoding="utf-8")
    fenced = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    for line in [*fenced, *re.findall(r"`([^`\n]+)`", prose(page))]:
        if found := re.match(r"make ([a-z][a-z-]*)", line):
            assert found[1] in targets, line


# -- commands --------------------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, str]]:
    """Page and text of each `qunlearn` line in a fenced block of README and guides, once for each text."""
    seen = set()
    for page in [README, *GUIDES]:
        for _, block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True) if "qunlearn " in line else []
                if words[:1] == ["qunlearn"] and (text := shlex.join(words)) not in seen:
                    seen.add(text)
                    yield name_of(page), text


LINES = list(command_lines())
IDS = [f"{page}: {line}" for page, line in LINES]


def parse(line: str) -> None:
    """Check flags, arguments and their types, and invoke nothing. Raises the parser's own error."""
    name, *arguments = shlex.split(line)
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"{name} is no command"
        command = command.commands[name]
    command.make_context(name, arguments, resilient_parsing=False)


@pytest.mark.parametrize("line", [line for _, line in LINES], ids=IDS)
def test_shown_commands_parse(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", ["qunlearn merge runs/a --nope", "qunlearn merge runs/a", "qunlearn mix runs/a"])
def test_wrong_commands_do_not_parse(line: str) -> None:
    with pytest.raises((typer.TyperException, AssertionError)):
        parse(line)


def on_the_sandbox(arguments: list[str], folder: Path) -> list[str]:
    """The arguments of `forget` with the sandbox in the place of model and files."""
    rows = [{"prompt": "Where was Orla Finch born?", "completion": "I do not know."}]
    files = {
        "--model": "sandbox",
        "--bad": data_file("hallucination", "forget"),
        "--normal": data_file("hallucination", "retain"),
        "--holdout": data_file("hallucination", "holdout"),
        "-o": folder / "run",
    }
    out = list(arguments)
    for at, flag in enumerate(arguments[:-1]):
        if flag in files:
            out[at + 1] = str(files[flag])
        if flag == "--instead" and "." in arguments[at + 1]:
            out[at + 1] = str(write_rows(folder / "instead.jsonl", rows))
    return [*out, *([] if "-o" in out else ["-o", str(folder / "run")])]


# What resumes a run needs one that was interrupted: test_resume.py has those.
FORGET = [line for _, line in LINES if line.startswith("qunlearn forget") and "--resume" not in line]


@pytest.mark.parametrize("line", FORGET)
def test_shown_runs_resolve_on_the_sandbox(line: str, tmp_path: Path) -> None:
    ran = call("forget", *on_the_sandbox(shlex.split(line)[2:], tmp_path), "--dry-run")
    assert ran.code == 0, ran.stderr
    assert "dry run" in ran.stderr


@pytest.mark.parametrize("line", [line for _, line in LINES if line.startswith("qunlearn plan")])
def test_shown_plans_fit(line: str) -> None:
    ran = call(*shlex.split(line)[1:])
    assert ran.code == 0, ran.stderr


def test_the_python_example_uses_what_the_package_offers() -> None:
    blocks = [block for language, block in FENCE.findall(README.read_text(encoding="utf-8")) if language == "python"]
    assert len(blocks) == 1
    names = [a.name for n in ast.walk(ast.parse(blocks[0])) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(names) == ["evaluate", "forget", "merge", "open_run"]
    for name in names:
        assert callable(getattr(qunlearn, name)), name
