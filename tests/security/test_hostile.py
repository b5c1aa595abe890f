"""Hostile input: a named error with a documented exit code, soon; no code run, nothing written, nothing obeyed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from conftest import call, write_rows
from hostile import data_files, model_files, texts, unlucky
from test_architectures import CONFIGS
from test_writer import make_adapter, make_base

from qunlearn.config.resolve import read_config_file, resolve
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Template, render
from qunlearn.errors import EXIT_CODES, ConfigError, DataError, ModelError, QunlearnError
from qunlearn.hub.adapter_files import check_adapter
from qunlearn.hub.preflight import preflight_folder
from qunlearn.merging.lora_tensors import read_adapter
from qunlearn.model.load import load_tokenizer
from qunlearn.report.read import read_story
from qunlearn.runs.folder import open_run
from qunlearn.utils import console

SECONDS, MOST_BYTES = 5.0, 500 << 20
DATA = list(data_files.cases())
MODELS, ADAPTERS, RECORDS = (
    list(cases()) for cases in (model_files.model_cases, model_files.adapter_cases, model_files.record_cases)
)
RECIPES, TEMPLATES, PROMPTS = (list(cases()) for cases in (texts.recipes, texts.templates, texts.prompts))


def ids(cases: list[tuple]) -> list[str]:  # type: ignore[type-arg]
    return [case[0] for case in cases]


CALLS = list(unlucky.calls())
KINDS = {
    "data": [f"{file} {name}" for name, file, _ in DATA],
    "models": [name for name, _ in MODELS],
    "adapters": [name for name, _ in ADAPTERS],
    "records": [name for name, _ in RECORDS],
    "recipes": [name for name, _ in RECIPES],
    "chat templates": [name for name, _ in TEMPLATES],
    "shown texts": [name for name, _ in PROMPTS],
    **{
        f"calls: {kind}": [call.name for call in CALLS if call.kind == kind]
        for kind in dict.fromkeys(c.kind for c in CALLS)
    },
}


def test_the_corpus_is_large_enough() -> None:
    """Of inputs that differ, by kind; what is refused by a reader, and what a whole call ends with."""
    for kind, names in KINDS.items():
        assert len(set(names)) == len(names) >= 15, kind
    assert len({(c.argv, tuple(c.files.items())) for c in CALLS}) == len(CALLS) >= 300
    assert sum(map(len, KINDS.values())) >= 900


@pytest.fixture(autouse=True)
def _watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock, memory, and a marker that a program hidden in a file would leave."""
    monkeypatch.chdir(tmp_path)
    before, started = _resident(forget_the_peak=True), _spent()
    yield
    assert _spent() - started < SECONDS
    assert _resident() - before < MOST_BYTES
    assert not list(tmp_path.rglob("evil_marker*")) and "evil_marker" not in sys.modules


def _spent() -> float:
    """Processor seconds, of children too: the clock on the wall would tell of this machine's other work."""
    return sum(os.times()[:4])


def _resident(*, forget_the_peak: bool = False) -> int:
    """The most this process has had in memory since the peak was forgotten; only Linux tells."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(refs, os.W_OK):
        return 0
    if forget_the_peak:
        refs.write_text("5")
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])


def refused(read: Callable[[], object], kind: type[QunlearnError]) -> QunlearnError:
    with pytest.raises(kind) as caught:
        read()
    assert caught.value.exit_code in EXIT_CODES and caught.value.exit_code > 1
    assert len(str(caught.value)) < 4000, "a message a person can read"
    return caught.value


@pytest.mark.parametrize(("name", "file", "raw"), DATA, ids=ids(DATA))
def test_data_files(tmp_path: Path, name: str, file: str, raw: bytes) -> None:
    path = tmp_path / file
    path.write_bytes(raw)
    refused(lambda: read_dataset(path), DataError)
    assert [p.name for p in tmp_path.iterdir()] == [file]


def test_a_bomb_is_not_unpacked_whole(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(300 << 20), 1))
    tracemalloc.start()
    try:
        refused(lambda: read_dataset(path), DataError)
        assert tracemalloc.get_traced_memory()[1] < 500 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(os.name == "nt", reason="names and links as POSIX has them")
@pytest.mark.parametrize("case", CALLS, ids=[f"{c.kind}: {c.name}" for c in CALLS])
def test_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: unlucky.Call) -> None:
    """Success or a named error, and no program's fault; nothing that was there is changed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _lay_out(tmp_path, case.files)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ran = call(*case.argv)
    assert ran.code in EXIT_CODES and ran.code not in (1, 130, 141), ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr and "\x1b" not in ran.stdout + ran.stderr
    # What the parser refuses has its own words.
    assert ran.stderr.count("error: ") == (ran.code != 0) or "─ Error" in ran.stderr or "Usage: " in ran.stdout
    assert {path: path.read_bytes() for path in before} == before


def _lay_out(folder: Path, files: Mapping[str, bytes | str | None]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


@pytest.mark.skipif(os.name == "nt", reason="no such devices")
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "a\0b", "x" * 300])
def test_names_that_are_no_files(name: str) -> None:
    refused(lambda: read_dataset(name), DataError)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, sandbox_folder: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    base = make_base(folder / "base", CONFIGS["llama"], sandbox_folder, torch.float32)
    return base, make_adapter(folder / "adapter", base)


@pytest.mark.parametrize(("name", "damage"), MODELS, ids=ids(MODELS))
def test_model_folders(sound: tuple[Path, Path], tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(sound[0], tmp_path / "model"))
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    error = refused(lambda: preflight_folder(folder), ModelError)
    assert error.where and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("name", "damage"), ADAPTERS, ids=ids(ADAPTERS))
def test_adapters(sound: tuple[Path, Path], tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    """Refused before peft sees it, or by the merge, which reads more."""
    folder = Path(shutil.copytree(sound[1], tmp_path / "adapter"))
    check_adapter(folder)
    damage(folder)

    def read() -> None:
        check_adapter(folder)
        read_adapter(folder)

    refused(read, ModelError)


@pytest.mark.parametrize("name", ["config-code", "config-code-megatron", "config-rank-huge", "config-targets-evil"])
def test_adapters_that_peft_would_obey(sound: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(sound[1], tmp_path / "adapter"))
    dict(ADAPTERS)[name](folder)
    refused(lambda: check_adapter(folder), ModelError)


@pytest.mark.parametrize(("name", "raw"), RECORDS, ids=ids(RECORDS))
def test_records_of_runs(sound: tuple[Path, Path], tmp_path: Path, name: str, raw: bytes) -> None:
    folder = Path(shutil.copytree(sound[1], tmp_path / "run" / "adapter")).parent
    (folder / "record.json").write_bytes(raw)
    refused(lambda: open_run(folder), ModelError)
    assert call("runs", tmp_path).code == 0  # a list of runs is no place to fail
    try:
        read_story(folder)
    except QunlearnError as error:
        assert error.exit_code in EXIT_CODES


@pytest.mark.parametrize(("name", "raw"), RECIPES, ids=ids(RECIPES))
def test_recipes(tmp_path: Path, name: str, raw: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(raw)
    refused(lambda: resolve((str(path), read_config_file(path))), ConfigError)


@pytest.fixture(scope="module")
def tokenizer(sandbox_folder: Path) -> object:
    return load_tokenizer(sandbox_folder)


@pytest.mark.parametrize(("name", "text"), TEMPLATES, ids=ids(TEMPLATES))
def test_chat_templates(
    tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", text)
    monkeypatch.setattr("qunlearn.utils.limits.SECONDS", 0.5)
    row = Record((("user", "who?"),), "nobody", 1, {})
    refused(lambda: render(row, Template("chat", "chat", "", ""), tokenizer), ModelError)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("raw", [b"", b"[]", b"[" * 5000, b'{"model": 3, "tokenizer_class": 3}', bytes(64)])
def test_tokenizers(sandbox_folder: Path, tmp_path: Path, file: str, raw: bytes) -> None:
    folder = Path(shutil.copytree(sandbox_folder, tmp_path / "model"))
    (folder / file).write_bytes(raw)
    refused(lambda: load_tokenizer(folder), ModelError)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa|aaa)+$"])
def test_a_tokenizer_whose_pattern_has_no_end(sandbox_folder: Path, tmp_path: Path, pattern: str) -> None:
    """The library bounds each match; what it raises is no Exception."""
    folder = Path(shutil.copytree(sandbox_folder, tmp_path / "model"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    path.write_text(json.dumps(tokenizer))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a" * 500 + "!", "completion": "b"}])
    ran = call("data", "check", rows, "--model", folder)
    assert ran.code == 6 and "gave up" in ran.stderr


def test_a_tokenizer_with_code_of_its_own(sandbox_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sandbox_folder, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "Strange"}
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('evil_marker', 'w')")
    try:
        load_tokenizer(folder)
    except ModelError as error:
        assert error.exit_code == 6


@pytest.mark.parametrize(("name", "text"), PROMPTS, ids=ids(PROMPTS))
def test_what_is_shown_is_not_obeyed(capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    console.say(text)
    console.table("t", [console.Column("x")], [[text]], to_stdout=True)
    console.facts("h", [("name", text)])
    shown = "".join(capsys.readouterr())
    assert not any(c in shown for c in "\x1b\x07\x08\r\x9b\u202e")
    if "[" in text and "\x1b" not in text:
        assert text.split()[0] in shown


def test_a_hostile_file_through_the_command_line(tmp_path: Path) -> None:
    """The errors of the readers reach a person as one message, whatever is in the names."""
    path = tmp_path / "[red]\x1b[2J.jsonl"
    path.write_text("{")
    ran = call("forget", "--model", "sandbox", "--bad", path, "-o", tmp_path / "run")
    assert ran.code == 3 and ran.stderr.count("error: ") == 1
    assert "\x1b" not in ran.stderr and "Traceback" not in ran.stderr
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "\x1b[2J[bold]a", "completion": "</td><script>b"}])
    args = ("forget", "--model", "sandbox", "--bad", tmp_path / "bad.jsonl", "-o", tmp_path / "run", "--dry-run")
    ran = call(*args)
    assert ran.code == 0 and "\x1b" not in ran.stderr
