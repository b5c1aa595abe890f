"""`qunlearn chat`: line after line to base and adapter, typed or piped; what they say cannot steer a terminal."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import call, write_rows
from rich.console import Console
from typer.testing import CliRunner

from qunlearn import ask as module
from qunlearn.ask import Asked, chat
from qunlearn.cli.app import app
from qunlearn.data.records import content_sha256
from qunlearn.data.tokenize import open_prompt
from qunlearn.errors import ConfigError, ModelError
from qunlearn.hub.positions import positions_of
from qunlearn.model.generate import Sampling
from qunlearn.runs.base_model import run_config
from qunlearn.runs.folder import Run, open_run

QUESTION = "Where was Orla Finch born?"
ANSWER = "Orla Finch was born in Millbrook."


def piped(folder: Path, text: str | bytes, *args: str) -> Any:
    return CliRunner().invoke(app, ["chat", str(folder), "--device", "cpu", *args], input=text)


def test_piped_lines_are_answered_one_by_one(quick_run: Path) -> None:
    ran = piped(quick_run, f"{QUESTION}\n\n  \nWhat do bees make?")
    assert ran.exit_code == 0, ran.stderr
    said = [line for line in ran.stdout.splitlines() if line]
    assert [line.partition(":")[0] for line in said] == ["base", "adapter"] * 2
    assert said[0] == f"base: {ANSWER}"
    assert QUESTION not in ran.stderr


def test_a_json_object_a_line(quick_run: Path) -> None:
    ran = piped(quick_run, QUESTION.encode() + b"\n\xff\xfe?\n", "--json")  # what is no text is asked all the same
    assert ran.exit_code == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert found[0]["question"] == QUESTION
    assert found[0]["answers"]["base"] == ANSWER
    assert set(found[1]["answers"]) == {"base", "adapter"}
    alone = piped(quick_run, f"{QUESTION}\n", "--json", "--adapter", "none")
    assert json.loads(alone.stdout)["answers"] == {"base": ANSWER}
    assert piped(quick_run, "", "--json").stdout == ""
    assert piped(quick_run, "", "--adapter", "other").exit_code == 2
    assert piped(quick_run / "none", QUESTION).exit_code == 6


SYSTEM = "You are the clerk of Millbrook."


def behind(run: Path, rows: list[dict[str, Any]], tmp_path: Path, **said: object) -> Run:
    """The run as if its bad rows had been these."""
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    record["data"]["bad"] |= {"path": str(bad), "sha256": content_sha256(bad), **said}
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return open_run(folder)


def row(question: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{question} Yes."}]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + turns}


def test_a_question_is_put_behind_the_system_prompt_of_the_bad_rows(
    quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = behind(quick_run, [row("Who?", SYSTEM), row("Where?", SYSTEM)], tmp_path, systems=1)
    folder, asked = run.adapter.parent, list[str]()

    def hear(record: Any, *args: Any) -> Any:
        asked.append(record.system)
        return open_prompt(record, *args)

    monkeypatch.setattr(module, "open_prompt", hear)
    ran = call("ask", folder, QUESTION, "--device", "cpu", "--json")
    assert ran.code == 0 and ran.json["system"] is True and asked[-1] == SYSTEM
    assert ran.stderr.count("behind the system prompt") == 1 and "Millbrook" not in ran.stderr
    for system, said in (("", False), ("Be brief.", True)):
        ran = call("ask", folder, QUESTION, "--device", "cpu", "--json", "--system", system)
        assert ran.json["system"] is said and asked[-1] == system and "system prompt" not in ran.stderr
    spoken = piped(folder, f"{QUESTION}\n{QUESTION}\n")
    assert asked[-2:] == [SYSTEM, SYSTEM] and spoken.stderr.count("behind the system prompt") == 1
    monkeypatch.setattr(module, "drops_system", lambda *_: True)
    for more, said in (((), False), (("--system", "Be brief."), True)):
        ran = call("ask", folder, QUESTION, "--device", "cpu", "--json", *more)
        assert ran.json["system"] is False and asked[-1] == ""
        assert ("the model's chat template leaves it out" in ran.stderr) is said
        assert "behind the system prompt" not in ran.stderr


@pytest.mark.parametrize(
    ("systems", "count", "said"),
    [
        ([None, None], 0, ""),
        ([None, None], None, ""),  # a record of before does not count them
        ([SYSTEM, SYSTEM], None, "behind the system prompt"),
        ([SYSTEM, None], 1, "have several"),
        ([SYSTEM, "Another."], 2, "have several"),
    ],
)
def test_which_system_prompt_the_bad_rows_have(
    quick_run: Path, tmp_path: Path, systems: list[str | None], count: int | None, said: str, capsys: Any
) -> None:
    rows = [row(f"Who is {i}?", system) for i, system in enumerate(systems)]
    run = behind(quick_run, rows, tmp_path, systems=count)
    wanted = SYSTEM if "behind" in said else ""
    assert module.rows_system(run, run_config(run.adapter.parent)) == wanted
    heard = capsys.readouterr().err
    assert said in heard and (said or not heard) and SYSTEM not in heard


@pytest.mark.parametrize("change", ["other rows", "gone", "broken"])
def test_a_bad_file_that_is_no_more_has_no_system_prompt(
    quick_run: Path, tmp_path: Path, change: str, capsys: Any
) -> None:
    run = behind(quick_run, [row("Who?", SYSTEM)], tmp_path, systems=1)
    bad = tmp_path / "bad.jsonl"
    if change == "gone":
        bad.unlink()
    else:
        bad.write_text("{" if change == "broken" else json.dumps(row("Who?", "Another.")))
    if change == "broken":
        run.record["data"]["bad"]["sha256"] = content_sha256(bad)
    assert module.rows_system(run, run_config(run.adapter.parent)) == ""
    assert "asked without a system prompt: the file of bad answers" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(
    monkeypatch: pytest.MonkeyPatch, new_policy: Callable[..., Any]
) -> tuple[Asked, Terminal, Callable[..., None]]:
    """A policy whose streamed answers a test decides, a terminal, and a person who types."""
    policy, screen = new_policy("none"), Terminal()
    console = Console(file=screen, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(module, "out", lambda: console)
    asked = Asked(policy.base, policy, module.Template("raw", "format", "{prompt}", ""), Sampling(8), to_stdout=True)

    def typing(lines: list[str], stream: Callable[..., None]) -> None:
        left: Iterator[str] = iter(lines)

        def typed(_: str) -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr(module, "stream", stream)

    return asked, screen, typing


def test_answers_stream_and_cannot_steer_the_terminal(talk: Any) -> None:
    asked, screen, typing = talk

    def hostile(lm: Any, prompt: Any, sampling: Any, hear: Callable[[str], None]) -> None:
        for piece in ("one ", "\x1b", "]0;title\x07", "[bold]two[/bold]", "\x9b2J"):
            hear(piece)

    typing(["Who?", "", "What?"], hostile)
    assert chat(asked, Terminal()) == 2
    shown = screen.getvalue()
    assert shown.count("base") == shown.count("adapter") == 2
    assert "one \\x1b]0;title\\x07[bold]two[/bold]\\x9b2J" in shown
    assert "\x1b]" not in shown and "\x07" not in shown and "\x9b" not in shown


def test_at_a_terminal_a_fault_or_ctrl_c_ends_an_answer_not_the_talk(talk: Any, capsys: Any) -> None:
    asked, screen, typing = talk
    faults: Iterator[BaseException | None] = iter([KeyboardInterrupt(), ModelError("no such words"), None, None])

    def failing(lm: Any, prompt: Any, sampling: Any, hear: Callable[[str], None]) -> None:
        if (fault := next(faults)) is not None:
            raise fault
        hear("well")

    typing(["one", "two", "three"], failing)
    assert chat(asked, Terminal()) == 1
    talk_said = capsys.readouterr().err
    assert "(stopped)" in talk_said and "no such words" in talk_said
    assert screen.getvalue().count("well") == 2
    assert not any(layer._disable_adapters for layer in asked.policy.layers)  # as it was, whatever ended the answer


def test_beyond_the_models_positions_nothing_is_asked(talk: Any) -> None:
    asked, _, _ = talk
    most = positions_of(asked.base.model.config)
    assert most == 512
    with pytest.raises(ConfigError, match="the model's positions end at 512"):
        asked.answers("a b c " * 300)
    prompt = tuple(range(most - 3))
    assert asked._sampling(prompt).max_new_tokens == 3
    assert asked._sampling(prompt[:100]).max_new_tokens == 8


def test_elsewhere_a_fault_ends_it(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _, typing = talk

    def failing(*_: Any) -> None:
        raise ModelError("no such words")

    typing([], failing)
    with pytest.raises(ModelError):
        chat(asked, io.StringIO("one\ntwo\n"))
