"""Streams that cannot say a character, are closed, full, or a pipe whose reader has gone: no traceback, no exit 1."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import call
from rich.console import Console

from qunlearn import ask as asking
from qunlearn.cli import failures
from qunlearn.errors import GateError
from qunlearn.utils import console
from qunlearn.utils.streams import PIPE_CLOSED

ODD = "data–é█.jsonl"


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of a shell in which `q` is the command line."""
    q = f'q() {{ "{sys.executable}" -m qunlearn "$@"; }}\n'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(["bash", "-c", q + line], capture_output=True, cwd=folder, env=env, check=False)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of another language with a name that Latin alphabets lack."""
    row = {"prompt": "Где █?", "completion": "Тут – 🐝"}
    (tmp_path / ODD).write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return tmp_path


pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell's redirections")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_cannot_be_said_is_replaced(encoding: str, rows: Path) -> None:
    done = shell(f"q data check {ODD}", rows, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert b"1 rows" in done.stdout and b"Traceback" not in done.stderr
    done = shell(f"q data check nowhere-{ODD}", rows, PYTHONIOENCODING=encoding)
    assert done.returncode == 3 and b"nowhere-data" in done.stderr


def test_json_loses_no_character(rows: Path) -> None:
    found = [
        json.loads(shell(f"q data check {ODD} --json", rows, PYTHONIOENCODING=e).stdout) for e in ("ascii", "utf8")
    ]
    assert found[0] == found[1] and ODD in json.dumps(found[0], ensure_ascii=False)


@pytest.mark.parametrize("what", ["models --json", "--help"])
def test_a_stdout_that_takes_nothing(what: str, tmp_path: Path) -> None:
    full = shell(f"q {what} > /dev/full", tmp_path)
    assert full.returncode == 9 and b"stdout: cannot be written: No space" in full.stderr, full.stderr
    closed = shell(f"q {what} >&-", tmp_path)
    assert closed.returncode == 9 and b"Bad file descriptor" in closed.stderr, closed.stderr
    gone = shell(f"q {what} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (gone.returncode, gone.stderr) == (PIPE_CLOSED, b"")


def test_a_stderr_that_takes_nothing_ends_nothing(rows: Path) -> None:
    for redirected in ("2> /dev/full", "2>&-", "<&-"):
        done = shell(f"q data check {ODD} --json {redirected}", rows)
        assert done.returncode == 0 and json.loads(done.stdout)
    assert shell("q data check nowhere 2>&-", rows).returncode == 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("eval", "--rows", "0", "--json"), "--rows"),
        (("models", "--jsonn", "--json"), "--jsonn"),
        (("ask", "--json"), "RUN"),
        (("recipe", "runn", "--json"), "runn"),
        (("nosuch", "--json"), "nosuch"),
        (("ask", "none", "x", "--json"), "no such folder"),
    ],
)
def test_a_call_that_is_refused_has_its_document(argv: tuple[str, ...], says: str) -> None:
    """What the parser refused left stdout empty, and what read it with an error of its own."""
    ran = call(*argv)
    assert ran.code in (2, 6)
    assert ran.json["status"] == "error" and ran.json["exit_code"] == ran.code
    assert says in ran.json["error"]["message"]
    assert call(*argv[:-1]).stdout == ""


@pytest.mark.parametrize(("reported", "status"), [(False, "interrupted"), (True, "done")])
def test_an_interrupted_call_has_one_document(
    reported: bool, status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qunlearn", "eval", "--json"])

    def command() -> None:
        if reported:
            console.emit_json({"status": "done"})
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as stop:
        failures.guarded(command)()
    assert stop.value.exit_code == 130
    assert json.loads(capsys.readouterr().out)["status"] == status


def test_a_gate_that_failed_before_any_report_has_a_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qunlearn", "merge", "--json"])

    def command() -> None:
        raise GateError("came back")

    with pytest.raises(typer.Exit):
        failures.guarded(command)()
    assert json.loads(capsys.readouterr().out)["exit_code"] == 5


def test_a_question_that_is_no_text_is_asked_all_the_same() -> None:
    heard: list[str] = []

    class Nobody:
        system = ""

        class template:
            name = "chat"

        def answers(self, question: str) -> dict[str, str]:
            heard.append(question)
            return {}

    found: Any = asking.ask(Nobody(), "b\udce9e?")  # type: ignore[arg-type]
    assert heard == [found["question"]] == ["b\ufffde?"]


def test_tables_are_drawn_in_ascii_where_nothing_else_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(console, "out", lambda: Console(file=stream))
    console.table("t", [console.Column("x")], [["é"]], to_stdout=True)
    stream.seek(0)
    assert "\ufffd" not in stream.read()
