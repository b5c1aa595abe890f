"""`qunlearn audit` in several processes: the cells of one process, byte for byte, whoever attacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import call, sets, write_rows
from launched import Call, launch

from qunlearn.model import device
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.utils.file_names import AUDIT_RESULT
from qunlearn.utils.staging import staging_folder

pytestmark = pytest.mark.medium

FORGET, RETAIN = data_file("hallucination", "forget"), data_file("hallucination", "retain")
HOLDOUT = data_file("hallucination", "holdout")


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)


def line(folder: Path, *more: object, facts: int = 6) -> list[object]:
    """An audit of the retrained model beside the original one, which placebo facts control."""
    rows = [json.loads(text) for text in Path(FORGET).read_text(encoding="utf-8").splitlines()[:facts]]
    forget = write_rows(folder.with_name("forget.jsonl"), rows)
    given = ("--original", ASSETS / "model", "--forget", forget, "--retain", RETAIN)
    return ["audit", ASSETS / "gold", *given, "-o", folder, "--device", "cpu", *more]


def written(folder: Path) -> dict[str, Any]:
    """Every file of an audit but its journal, and the result without how long it took."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    result = json.loads(files.pop(AUDIT_RESULT))
    assert result.pop("seconds") >= 0
    return {**files, AUDIT_RESULT: result}


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Formats that are asked and scored, what hangs on the original's answers, relearning, the layers."""
    only = ("--only", "formats.open,reworded,choice-text,relearning.half,lens", "--json")
    one = call(*line(tmp_path / "one", *only))
    told = launch(2, tmp_path, [Call(line(tmp_path / "two", *only)), Call(line(tmp_path / "two", *only))])
    assert one.code in (0, 5) and [process[0]["code"] for process in told] == [one.code] * 2, told[0][0]["stderr"]
    assert written(tmp_path / "two") == written(tmp_path / "one")
    assert json.loads(told[0][0]["stdout"])["rows"] == one.json["rows"]
    assert told[1][0]["stdout"] == told[1][0]["stderr"] == ""
    assert told[0][1]["code"] == 9 and "--overwrite" in told[0][1]["stderr"]  # it is there
    assert told[1][1]["stderr"] == ""


@pytest.mark.slow
def test_the_questions_of_a_prefix_search_are_divided(tmp_path: Path) -> None:
    only = ("--only", "formats.open,prompts.prefix-search", "--budget", "deep", "--json")
    one = call(*line(tmp_path / "one", *only, facts=4))
    told = launch(3, tmp_path, [Call(line(tmp_path / "three", *only, facts=4))])
    assert [process[0]["code"] for process in told] == [one.code] * 3, told[0][0]["stderr"]
    assert written(tmp_path / "three") == written(tmp_path / "one")
    searched = json.loads((tmp_path / "three" / "prompts.prefix-search.unlearned.json").read_text())["more"]["searched"]
    assert searched["nll_after"] < searched["nll_before"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_whole_audit_of_a_run(count: int, quick_run: Path, tmp_path: Path) -> None:
    """The adapter scaled, rounded and merged, members and neighbours, beside a control that is loaded after it."""
    files = ("--holdout", HOLDOUT, "--retain", RETAIN, "--budget", "standard", "--control", ASSETS / "gold")
    rows = [json.loads(text) for text in Path(FORGET).read_text(encoding="utf-8").splitlines()[:6]]
    how: list[object] = [*files, "--forget", write_rows(tmp_path / "forget.jsonl", rows), "--device", "cpu", "--json"]
    one = call("audit", quick_run, *how, "-o", tmp_path / "one")
    told = launch(count, tmp_path, [Call(["audit", quick_run, *how, "-o", tmp_path / "several"])])
    assert [process[0]["code"] for process in told] == [one.code] * count, told[0][0]["stderr"]
    assert {process[0]["stdout"] + process[0]["stderr"] for process in told[1:]} == {""}
    assert written(tmp_path / "several") == written(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.*.*.json"))) > 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "hit", "code"),
    [
        ("SIGKILL at cell 3", 0, None),
        ("SIGKILL at cell 3", 1, None),
        ("SIGINT at cell 3", 0, 130),
        ("an error at cell 3", 1, 3),
    ],
)
def test_an_audit_that_was_cut_off_is_resumed(fault: str, hit: int, code: int | None, tmp_path: Path) -> None:
    """In another number of processes, to what it would have come to."""
    only = ("--only", "formats,relearning.half", "--budget", "quick")
    assert call(*line(tmp_path / "one", *only)).code in (0, 5)
    told = launch(2, tmp_path, [Call(line(tmp_path / "cut", *only), fault, [hit])])
    if code is not None:
        assert told[hit][0]["code"] == code
    assert told[1 - hit][0]["code"] == 8, told[1 - hit][0]["stderr"]
    assert not (tmp_path / "cut").exists() and staging_folder(tmp_path / "cut").exists()
    told = launch(3, tmp_path, [Call(line(tmp_path / "cut", *only))])
    assert [process[0]["code"] in (0, 5) for process in told] == [True] * 3, told[0][0]["stderr"]
    assert "known from before: " in told[0][0]["stderr"]
    assert written(tmp_path / "cut") == written(tmp_path / "one")


@pytest.mark.slow
def test_a_run_in_two_processes_ends_with_its_audit(tmp_path: Path) -> None:
    """Audited by the main process while the other one waits; `--resume` finds it done."""
    short = {"train.steps": 4, "data.normal_count": 24, "data.reworded": 0, "stop.table_rows": 8, "stop.probe_rows": 8}
    how = ["--model", "sandbox", "--device", "cpu", "--audit", "quick", "--json", *sets(short)]
    rows = [json.loads(text) for text in Path(FORGET).read_text(encoding="utf-8").splitlines()[:8]]
    run = ["forget", "--bad", write_rows(tmp_path / "bad.jsonl", rows), *how, "-o", tmp_path / "run"]
    main, other = launch(2, tmp_path, [Call(run), Call([*run, "--resume"])])
    assert main[0]["code"] == other[0]["code"] in (0, 5), main[0]["stderr"]
    found = json.loads(main[0]["stdout"])["audit"]
    assert found["status"] in ("leaks", "no leak found") and found["folder"] == str(tmp_path / "run" / "audit")
    assert (tmp_path / "run" / "audit" / AUDIT_RESULT).is_file()
    assert main[1]["code"] == main[0]["code"] and "audit" not in json.loads(main[1]["stdout"])
    assert {said["stdout"] + said["stderr"] for said in other} == {""}
