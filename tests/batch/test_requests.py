"""`qunlearn batch`: runs equal to those of their own commands, from one base; failures, refusals, and going on."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, call, few, sets, write_rows
from safetensors.torch import load_file

from qunlearn import batch
from qunlearn.batch import read_requests
from qunlearn.config.settings import Config
from qunlearn.errors import ConfigError, DataError
from qunlearn.sandbox import data_file
from qunlearn.training import bases as bases_module
from qunlearn.training import gradients
from qunlearn.utils.file_names import ADAPTER, RECORD

pytestmark = pytest.mark.medium

BAD, OTHER = data_file("hallucination", "forget"), data_file("hallucination", "retain")
NORMAL = data_file("hallucination", "holdout")
SHARED: Mapping[str, object] = {**QUICK, "train.steps": 4, "stop.check_every": 2, "stop.table_rows": 4}
FLAGS = ["--model", "sandbox", "--device", "cpu", "--normal", NORMAL, *sets({**SHARED, "data.own_share": 0})]


def adapter(run: Path) -> dict[str, Any]:
    return dict(load_file(run / ADAPTER / "adapter_model.safetensors"))


def same_adapter(one: Path, other: Path) -> None:
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_runs_of_one_base_are_those_of_their_own_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, though the base was loaded once; one that fails stands between them."""
    bad, other = str(few(tmp_path, BAD)), str(few(tmp_path, OTHER))
    loads: list[Path] = []
    load = bases_module.load_base
    monkeypatch.setattr(bases_module, "load_base", lambda folder, spec: loads.append(folder) or load(folder, spec))
    file = write_rows(
        tmp_path / "requests.jsonl",
        [
            {"bad": bad, "name": "first", "train.checkpointing": "always"},
            {"bad": str(tmp_path / "none.jsonl")},
            {"bad": other, "name": "second", "objective": "npo", "lora_r": 4, "train.checkpointing": "never"},
        ],
    )
    ran = call("batch", file, *FLAGS, "-o", tmp_path / "queue", "--json")
    first, none, second = ran.json["runs"]
    assert (first["name"], none["name"], second["name"]) == ("first", "none", "second")
    assert (none["status"], none["exit_code"]) == ("error", 3) and "no such file" in none["message"]
    assert first["exit_code"] in (0, 5) and second["exit_code"] in (0, 5)
    assert ran.code == next(one["exit_code"] for one in ran.json["runs"] if one["exit_code"])
    assert len(loads) == 1
    assert json.loads((tmp_path / "queue" / "second" / RECORD).read_text())["status"] == second["status"]
    alone = ["--bad", other, *FLAGS, "-o", tmp_path / "alone"]
    alone += ["--objective", "npo", "--lora-r", 4, "--set", "train.checkpointing=never"]
    assert call("forget", *alone).code == second["exit_code"]
    same_adapter(tmp_path / "alone", tmp_path / "queue" / "second")

    before = len(loads)
    again = call("batch", file, *FLAGS, "-o", tmp_path / "queue", "--json")  # nothing is left to do
    assert [one["status"] for one in again.json["runs"]] == [one["status"] for one in ran.json["runs"]]
    assert again.code == ran.code and len(loads) == before


def test_a_signal_ends_the_queue_and_the_same_command_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = str(few(tmp_path, BAD))
    file = write_rows(tmp_path / "requests.jsonl", [{"bad": bad, "name": name} for name in ("one", "two", "three")])
    passes, calls = gradients.MicroBatcher._passes, []

    def stopped(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second step of the second run
            signal.raise_signal(signal.SIGTERM)
        return passes(self, *args)

    monkeypatch.setattr(gradients.MicroBatcher, "_passes", stopped)
    ran = call("batch", file, *FLAGS, "-o", tmp_path / "queue", "--json")
    assert ran.code == 130
    assert [one["exit_code"] for one in ran.json["runs"]][1:] == [130]
    again = call("batch", file, *FLAGS, "-o", tmp_path / "queue")
    assert again.code in (0, 5) and "resuming after step 2" in again.stderr
    assert "this run is finished" in again.stderr and "three" in again.stdout
    same_adapter(tmp_path / "queue" / "one", tmp_path / "queue" / "two")


def test_overwrite_begins_every_request_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []

    def made(config: Config, *, resume: bool, bases: object) -> dict[str, str]:
        asked.append((config.output.overwrite, resume))
        return {"status": "done"}

    monkeypatch.setattr(batch, "run_forget", made)
    file = write_rows(tmp_path / "requests.jsonl", [{"bad": str(BAD)}])
    for flags in ([], ["--overwrite"]):
        assert call("batch", file, "--model", "sandbox", *flags, "-o", tmp_path / "queue").code == 0
    assert asked == [(False, True), (True, False)]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", DataError, "not valid JSON"),
        ("[]", DataError, "not a JSON object"),
        ('{"normal": "a.jsonl"}', ConfigError, "no file of bad answers"),
        ('{"bad": "a.jsonl", "model": "x"}', ConfigError, "cannot be a request's own"),
        ('{"bad": "a.jsonl", "output.folder": "x"}', ConfigError, "cannot be a request's own"),
        ('{"bad": "a.jsonl", "model.trust_remote_code": true}', ConfigError, "cannot be a request's own"),
        ('{"bad": "a.jsonl", "lorar": 4}', ConfigError, "requests.jsonl:2: unknown key"),
        ('{"bad": "a.jsonl", "name": "../x"}', ConfigError, "a request's name"),
        ('{"bad": "a.jsonl", "name": ".."}', ConfigError, "a request's name"),
        ('{"bad": "other/first.jsonl"}', ConfigError, "another request is called 'first'"),
    ],
)
def test_requests_that_are_refused(line: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    """Before anything is begun, with file and line."""
    file = tmp_path / "requests.jsonl"
    file.write_text('{"bad": "first.jsonl"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(error) as caught:
        read_requests(str(file), [])
    assert message in str(caught.value) and f"{file}:2" in str(caught.value)


def test_no_requests(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        read_requests(str(file), [])
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no requests"):
        read_requests(str(file), [])
    assert call("batch", file, "--model", "sandbox").code == 3
