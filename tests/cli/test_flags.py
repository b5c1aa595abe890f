"""Flags that would do nothing, or name what is not there: refused before any work, by the flag's own name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import typer
from conftest import call, write_rows

from qunlearn.cli import failures
from qunlearn.errors import OutputError
from qunlearn.evaluation.cache import Cache
from qunlearn.hub.preflight import commit_of

ROWS = [{"prompt": "Who?", "completion": "Ada."}]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (("export", "none", "-o", "e", "--model", "m"), 2, "--model: of no use with --format peft"),
        (("export", "none", "-o", "e", "--bad", "f", "--no-measure"), 2, "--bad, --no-measure: of no use"),
        (("export", "none", "-o", "e", "--base", "dequantized"), 2, "--base: of no use"),
        (("export", "none", "-o", "e", "--format", "gguf-lora", "--device", "cpu"), 2, "--device: of no use"),
        (("export", "none", "-o", "e", "--format", "gguf-lora", "--model", "m"), 6, "no such folder"),
        (
            ("data", "import", "alpaca", "f", "-o", "o", "--ask", "{text}?"),
            2,
            "--ask: of no use with the format alpaca",
        ),
        (("data", "import", "alpaca", "f", "-o", "o", "--prompt-words", 30), 2, "--prompt-words: of no use"),
        (("eval", "sandbox", "--forget", "bad.jsonl", "--quant", "nf5"), 2, "unknown form 'nf5'"),
        (("eval", "sandbox", "--forget", "bad.jsonl", "--retrained-model", "nosuch"), 6, "--retrained-model: unknown"),
        (("eval", "sandbox", "--forget", "bad.jsonl", "--harm-classifier", "./no"), 6, "--harm-classifier: no such"),
        (("eval", "sandbox", "--forget", "bad.jsonl", "--reward-model", "nosuch"), 6, "--reward-model: unknown"),
    ],
)
def test_what_is_refused(
    argv: tuple[object, ...], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "bad.jsonl", ROWS)
    ran = call(*argv)
    assert (ran.code, says in ran.stderr) == (code, True), ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_an_adapter_given_as_a_model_has_a_hint_that_can_be_followed(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    ran = call("forget", "--model", tmp_path, "--bad", write_rows(tmp_path / "bad.jsonl", ROWS))
    assert ran.code == 6 and "qunlearn eval BASE --adapter" in ran.stderr


def test_an_empty_section_is_no_mistake(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lora:\n  # r: 8\nmodel:\n  name: sandbox\n", encoding="utf-8")
    ran = call("plan", "-c", recipe, "--json")
    assert ran.code == 0, ran.stderr


def test_a_demo_says_at_once_that_its_folders_are_taken(tmp_path: Path) -> None:
    for name in ("run", "run-merged"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine").touch()
        ran = call("demo", "-o", tmp_path / "run")
        assert ran.code == 9 and "--overwrite" not in ran.stderr and str(folder) in ran.stderr
        (folder / "mine").unlink()


def test_eval_notices_a_closed_folder_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", ROWS)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK or "closed" not in str(path))
    (tmp_path / "closed").mkdir()
    ran = call("eval", "sandbox", "--forget", bad, "-o", tmp_path / "closed")
    assert ran.code == 9 and "cannot be written" in ran.stderr and "measuring" not in ran.stderr
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be"):
        Cache(tmp_path).save(tmp_path / "file" / "sub" / "x.jsonl", [])


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EROFS, errno.EMFILE])
def test_a_fault_of_the_surroundings_is_not_ours(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Permissions, full disks and names too long were reported as faults of the program, exit 1."""

    def command() -> None:
        raise OSError(number, os.strerror(number), "some/where")

    with pytest.raises(typer.Exit) as stop:
        failures.guarded(command)()
    assert stop.value.exit_code == 9
    said = capsys.readouterr().err
    assert "some/where" in said and "report" not in said


def test_a_run_belongs_to_a_commit_of_the_hub(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    assert commit_of(tmp_path / "snapshots" / commit) == commit
    assert commit_of(tmp_path / "snapshots" / "main") is None
    assert commit_of(tmp_path / commit) is None
