"""`qunlearn batch` in several processes: the runs of one, whoever makes them, and nothing is lost where one stops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, call, sets, write_rows
from launched import Call, launch
from safetensors.torch import load_file

from qunlearn.batch import _check_several
from qunlearn.config.resolve import resolve
from qunlearn.errors import ConfigError
from qunlearn.model import device
from qunlearn.sandbox import data_file
from qunlearn.utils.file_names import ADAPTER, RECORD
from qunlearn.utils.staging import staging_folder

pytestmark = pytest.mark.medium

BAD, OTHER = data_file("hallucination", "forget"), data_file("hallucination", "retain")
SHORT: Mapping[str, object] = {
    **QUICK,
    "train.steps": 4,
    "train.save_every": 1,
    "data.own_share": 0,
    "stop.check_every": 2,
    "stop.table_rows": 4,
    "stop.probe_rows": 8,
}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)


def few(source: Path | str, path: Path, count: int = 8) -> Path:
    path.write_text("".join(Path(source).read_text().splitlines(keepends=True)[:count]))
    return path


def flags(folder: Path) -> list[object]:
    normal = few(data_file("hallucination", "holdout"), folder / "normal.jsonl", 24)
    return ["--model", "sandbox", "--device", "cpu", "--normal", normal, *sets(SHORT)]


def codes(said: list[list[dict[str, Any]]]) -> list[list[int]]:
    return [[call["code"] for call in process] for process in said]


def same_adapter(one: Path, other: Path) -> None:
    a, b = (load_file(run / ADAPTER / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_runs_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """To the last bit, each made by one process, and listed in the file's order; one fails, and keeps nobody back."""
    file = write_rows(
        tmp_path / "requests.jsonl",
        [
            {"bad": str(few(BAD, tmp_path / "first.jsonl"))},
            {"bad": str(tmp_path / "none.jsonl")},
            {"bad": str(few(OTHER, tmp_path / "third.jsonl")), "objective": "npo", "reference": "cached"},
        ],
    )
    one = call("batch", file, *flags(tmp_path), "-o", tmp_path / "one", "--json")
    line = ["batch", file, *flags(tmp_path), "-o", tmp_path / "two"]
    main, other = launch(2, tmp_path, [Call([*line, "--json"]), Call(line)])
    assert one.code != 0 and codes([main, other]) == [[one.code] * 2] * 2, main[0]["stderr"]
    told = json.loads(main[0]["stdout"])["runs"]
    for ours, theirs in zip(told, one.json["runs"], strict=True):
        assert {**ours, "folder": ""} == {**theirs, "folder": ""}
    assert [run["name"] for run in told] == ["first", "none", "third"]
    for name in ("first", "third"):
        same_adapter(tmp_path / "one" / name, tmp_path / "two" / name)
        assert json.loads((tmp_path / "two" / name / RECORD).read_text())["training"]["processes"] == 1
    began = [
        name for said in (main, other) for name in ("first", "none", "third") if f": {name}\n" in said[0]["stderr"]
    ]
    assert sorted(began) == ["first", "none", "third"]
    assert other[0]["stdout"] == other[1]["stdout"] == ""
    assert all(text.startswith("process 1: ") for text in other[0]["stderr"].splitlines())
    assert "no such file" in main[0]["stderr"] + other[0]["stderr"]
    # Once more, and nothing is left to do; a table this time.
    assert "no such file" in main[1]["stdout"] and "third" in main[1]["stdout"]


@pytest.mark.slow
def test_a_signal_in_one_process_stops_all_and_any_number_continues(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "requests.jsonl",
        [{"bad": str(few(BAD, tmp_path / "bad.jsonl")), "name": name} for name in ("a", "b", "c", "d", "e")],
    )
    line: list[object] = ["batch", file, *flags(tmp_path), "--set", "train.steps=12", "-o", tmp_path / "queue"]
    told = launch(2, tmp_path, [Call([*line, "--json"], "SIGTERM at step 3", [1])])
    assert codes(told) == [[130], [130]], told[0][0]["stderr"]
    runs = {run["name"]: run for run in json.loads(told[0][0]["stdout"])["runs"]}
    assert {"a", "b"} <= runs.keys() and 130 in {run["exit_code"] for run in runs.values()} and "e" not in runs
    stopped = [name for name, run in runs.items() if run["exit_code"] == 130]
    assert all(staging_folder(tmp_path / "queue" / name).exists() for name in stopped)
    told = launch(3, tmp_path, [Call([*line, "--json"])])
    again = json.loads(told[0][0]["stdout"])["runs"]
    assert [run["name"] for run in again] == ["a", "b", "c", "d", "e"]
    assert {run["exit_code"] for run in again} <= {0, 5}
    said = "".join(process[0]["stderr"] for process in told)
    assert all(f"process {n}: request " in said for n in (1, 2))
    for name in ("b", "c", "d", "e"):
        same_adapter(tmp_path / "queue" / "a", tmp_path / "queue" / name)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_is_killed_and_one_continues(killed: int, tmp_path: Path) -> None:
    """What the others have made is there; what was lost with it is made by the same command, here in one process."""
    file = write_rows(
        tmp_path / "requests.jsonl",
        [{"bad": str(few(BAD, tmp_path / "bad.jsonl")), "name": name} for name in ("a", "b", "c")],
    )
    line: list[object] = ["batch", file, *flags(tmp_path), "-o", tmp_path / "queue"]
    told = launch(2, tmp_path, [Call(line, "SIGKILL at step 4", [killed])])
    assert told[1 - killed][0]["code"] == 8, told[1 - killed][0]["stderr"]
    assert "the same command continues" in told[1 - killed][0]["stderr"]
    made = [name for name in ("a", "b", "c") if (tmp_path / "queue" / name).is_dir()]
    assert len(made) == (2 if killed else 1)  # without the main process nobody hands out what is left
    again = call(*line, "--json")
    assert again.code in (0, 5) and [run["name"] for run in again.json["runs"]] == ["a", "b", "c"]
    assert "resuming after step 3" in again.stderr
    for name in ("b", "c"):
        same_adapter(tmp_path / "queue" / "a", tmp_path / "queue" / name)


def test_what_one_process_cannot_do_alone_is_refused() -> None:
    for way in ("auto", "fsdp"):
        config = resolve(("test", {"model.name": "sandbox", "model.device_map": way, "data.bad": "a.jsonl"}))
        with pytest.raises(ConfigError, match="each request is one process's"):
            _check_several(config.model)
