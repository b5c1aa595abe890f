"""`qunlearn doctor` and `qunlearn runs`: what they tell, and what they keep to themselves."""

from __future__ import annotations

import errno
import getpass
import io
import json
import platform
import shutil
from pathlib import Path

import pytest
from conftest import call
from rich.console import Console

from qunlearn import doctor
from qunlearn.runs import list as registry
from qunlearn.runs.list import find_runs
from qunlearn.sandbox import data_file


def test_a_sound_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = call("doctor", "--json")
    assert ran.code == 0, ran.stdout
    found = {f["name"]: f for f in ran.json["findings"]}
    assert {"system", "packages", "memory", "disk", "cuda", "sandbox"} <= found.keys()
    assert "gradient" in found["bitsandbytes, 4-bit"]["text"]
    for private in (str(tmp_path), str(Path.home()), platform.node(), f"{getpass.getuser()} "):
        assert private not in ran.stdout
    assert list(tmp_path.iterdir()) == []
    text = call("doctor").stdout
    assert "torch" in text and "gradient" in text


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.nn

    real = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, x: real(self, x.detach()) + 0 * x.sum())
    ran = call("doctor", "--json")
    assert ran.code == 11 and ran.json["status"] == "broken"
    broken = [f["name"] for f in ran.json["findings"] if f["state"] == "broken"]
    assert broken == ["bitsandbytes, 4-bit"]


def test_what_raises_is_a_finding_without_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> doctor.Finding:
        raise OSError("cannot open /home/somebody/lib.so at all")

    monkeypatch.setattr(doctor, "_four_bit", fails)
    found = [f for f in doctor.examine() if f.state == doctor.BROKEN]
    assert [f.text for f in found] == ["OSError: cannot open (a path) at all"]


def test_a_folder_that_cannot_be_written_is_no_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", ".")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", closed)
    found = doctor._looked("disk", doctor._disk)
    assert (found.state, "cannot be written" in found.text) == (doctor.NOTE, True)


def test_a_closed_folder_hides_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text("{}")
    real = Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert [Path(row["run"]).name for row in find_runs(tmp_path)] == ["open"]
    ran = call("ask", tmp_path / "closed", "Who?")
    assert ran.code == 6 and "Permission denied" in ran.stderr


def test_a_run_was_when_it_ended_wherever_it_was_copied(tmp_path: Path) -> None:
    for name, ended in (("old", "2026-01-02T03:04:05+00:00"), ("edited", "<b>soon</b>"), ("none", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps({"ended": ended} if ended else {}))
    found = {Path(row["run"]).name: row["when"] for row in find_runs(tmp_path)}
    assert found["old"] == "2026-01-02T03:04:05+00:00"
    assert found["edited"] > "2026-11" and found["none"] > "2026-11"  # of their files


def test_a_path_is_whole_on_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a-run-with-a-long-name-that-tells-what-it-was-for"
    folder.mkdir()
    (folder / "record.json").write_text("{}")
    screen = io.StringIO()
    monkeypatch.setattr(registry, "out", lambda: Console(file=screen, force_terminal=True, width=60, highlight=False))
    registry.show_runs(find_runs(tmp_path))
    assert str(folder) in screen.getvalue().splitlines()


def test_the_list_of_runs(quick_run: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run, tmp_path / "a" / "run")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "record.json").write_text("{")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "record.json").write_text('{"data": [1], "model": "x", "training": {"best": 3}}')
    (tmp_path / ".d.unfinished").mkdir()
    (tmp_path / ".d.unfinished" / "unfinished.json").write_text('{"bad": "abc", "model": "def"}')
    ran = call("runs", tmp_path, "--json")
    assert ran.code == 0, ran.stderr
    rows = {Path(row["run"]).name: row for row in ran.json}
    assert {name: row["status"] for name, row in rows.items()} == {
        "run": "done",
        "b": "unreadable record",
        "c": "?",
        "d": "unfinished",
    }
    record = json.loads((quick_run / "record.json").read_text())
    run = rows["run"]
    assert run["forgot"]["file"] == "forget.jsonl"
    assert run["forgot"]["sha256"] == record["data"]["bad"]["sha256"]
    assert run["model"] == {"name": "sandbox", "fingerprint": record["model"]["fingerprint"]}
    assert run["result"]["bad_probability"] == record["training"]["best"]["forget"]
    bad = [json.loads(line) for line in data_file("hallucination", "forget").read_text().splitlines()]
    assert not any(row["prompt"] in ran.stdout or row["completion"] in ran.stdout for row in bad)
    text = call("runs", tmp_path).stdout
    assert "forget.jsonl" in text and "unfinished" in text
    assert call("runs", tmp_path / "none").code == 2
