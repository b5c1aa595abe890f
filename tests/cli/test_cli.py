"""The command line around the work: light imports, help, versions, layers."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import call, write_rows

import qunlearn
from qunlearn.cli.app import guarded
from qunlearn.config.settings import SETTINGS
from qunlearn.errors import EXIT_CODES, GateError, ModelError, QunlearnError
from qunlearn.utils.console import emit_json, warn

PACKAGE = Path(qunlearn.__file__).parent
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "numpy", "yaml"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["forget", "--help"],
        ["models", "--json"],
        ["--version"],
        ["plan", "--model", "llama-7b", "--vram", "6GiB"],
    ],
)
def test_answers_import_nothing_heavy(argv: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["qunlearn", *{argv!r}]
from qunlearn.cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("HEAVY", sorted(set(sys.modules) & {HEAVY!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout[-200:]


@pytest.mark.parametrize(
    ("error", "status"), [(GateError("the forgotten answers came back"), "came back"), (ModelError("no"), "error")]
)
def test_stdout_has_one_document_whatever_happens(
    error: QunlearnError, status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gate that failed printed its report and then an error, which no JSON parser takes."""
    monkeypatch.setattr(sys, "argv", ["qunlearn", "merge", "--json"])

    def command() -> None:
        if isinstance(error, GateError):
            emit_json({"status": "came back"})
        raise error

    with pytest.raises(typer.Exit) as stop:
        guarded(command)()
    assert stop.value.exit_code == error.exit_code
    assert json.loads(capsys.readouterr().out)["status"] == status


def test_the_document_has_the_warnings_of_its_own_call(capsys: pytest.CaptureFixture[str]) -> None:
    """`merge --json` said nothing of a run that had not reached its target."""

    def command(text: str) -> None:
        for _ in range(2):
            warn(text)
        emit_json({"status": "done"})

    for text in ("one", "two"):
        guarded(command)(text)
        assert json.loads(capsys.readouterr().out) == {"status": "done", "warnings": [text]}


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "qunlearn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"qunlearn {qunlearn.__version__}"


def test_a_refused_file_costs_no_heavy_import(tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["qunlearn", "forget", "--model", "sandbox", "--bad", {str(tmp_path / "none.jsonl")!r}]
from qunlearn.cli.app import main
try:
    main()
except SystemExit as stop:
    print(stop.code, sorted(set(sys.modules) & {HEAVY - {"yaml"}!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3 []"
    assert "Traceback" not in done.stderr


def test_every_flag_is_in_the_help() -> None:
    text = call("forget", "--help").stdout
    for setting in SETTINGS.values():
        if setting.flag:
            assert setting.flag in text
    assert "--dry-run" in text


def test_exit_codes_are_in_the_help_and_the_reference() -> None:
    text = " ".join(call("--help").stdout.split())
    page = (PACKAGE.parent / "docs" / "reference" / "exit-codes.md").read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text
        assert re.search(rf"^\| {code} \| {re.escape(meaning)} \|$", page, re.M), code


def test_models_lists_the_short_names() -> None:
    text = call("models").stdout
    for name in ("llama-7b", "llama-2-7b", "llama-3.1-8b", "mistral-7b", "opt-1.3b", "sandbox"):
        assert name in text


def test_nothing_of_ours_unpickles_or_runs_commands() -> None:
    tools = PACKAGE / "merging" / "llamacpp.py"  # starts the converters that an export asks for, and nothing else does
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                imported = {node.module}
            assert not imported & {"pickle", "shelve", "marshal"}, path
            assert "subprocess" not in imported or path == tools, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "torch.save", "eval", "exec", "os.system", "yaml.load"}, path


def test_the_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--output=~/x` as it is, and nobody wants a folder that is called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "raw.jsonl", [{"instruction": "Why?", "output": "So.", "input": ""}] * 4)
    ran = call("data", "import", "alpaca", rows, "--output=~/x.jsonl")
    assert ran.code == 0, ran.stderr
    assert (tmp_path / "home" / "x.jsonl").is_file() and not (tmp_path / "~").exists()
