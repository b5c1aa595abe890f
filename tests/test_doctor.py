"""`qunlearn doctor` and `qunlearn runs`: what they tell, and what they keep to themselves."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
from pathlib import Path

import pytest
from conftest import call

from qunlearn import doctor
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
