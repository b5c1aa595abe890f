"""The study of objectives under the audit: what is done is not done again, and the table says what was found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import audit_objectives as study
from qunlearn.utils.file_names import ADAPTER
from qunlearn.utils.output import MARK
from qunlearn.utils.staging import staging_folder


def row(family: str, form: str, verdict: str, unlearned: float, control: float) -> dict[str, Any]:
    shares = {name: {"mean": value} for name, value in (("unlearned", unlearned), ("control", control))}
    lead = {"mean": unlearned - control, "low": unlearned - control - 0.1, "high": unlearned - control + 0.1}
    return {"family": family, "format": form, "verdict": verdict, "shares": shares, "lead": lead}


def result(name: str, leaks: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    named = {"world": "v-saturated.4", "objective": name, "seed": 0, "budget": "quick"}
    return {**named, "run": "done", "leaks": leaks, "rows": rows}


def test_a_finished_audit_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "r.jsonl", []

    def measure(world: Any, name: str, *_: object) -> dict[str, Any]:
        calls.append(name)
        return result(name, [], [])

    monkeypatch.setattr(study, "measure", measure)
    world = study.ground_of("v-saturated.4")
    assert world.control is not None and world.control.parent.name == "v-saturated.4"
    study.run_all(world, ["npo"], 0, "quick", tmp_path, path)
    study.run_all(world, ["npo", "ga"], 0, "quick", tmp_path, path)
    study.run_all(world, ["npo"], 1, "quick", tmp_path, path)
    assert calls == ["npo", "ga", "npo"]
    assert [json.loads(line)["objective"] for line in path.read_text().splitlines()] == calls


def test_beside_placebo_facts_these_are_the_control() -> None:
    open_ = row("formats", "open", "leak", 0.5, 0.0)
    open_["shares"]["placebo"] = open_["shares"].pop("control")
    assert "| 50 / 0 |" in study.table([result("npo", [], [open_])])


def test_what_is_known_of_the_original_is_taken_from_another_audit(tmp_path: Path) -> None:
    """Its cells, under the identity of the new run: an audit that finds them there goes on with the others."""
    ground, done = study.Ground("w", tmp_path, None, tmp_path), tmp_path / "w-npo-0-quick"
    run, folder = tmp_path / "w-ga-0", tmp_path / "w-ga-0-quick"
    study._take_original(ground, run, folder)
    assert not staging_folder(folder).exists()  # neither a run nor another audit
    for made in (done, run / ADAPTER):
        made.mkdir(parents=True)
    (run / ADAPTER / "adapter_model.safetensors").write_bytes(b"x")
    files = {f"formats.open.{subject}.json": {"bytes": 2, "sha256": "0"} for subject in ("original", "unlearned")}
    for name in files:
        (done / name).write_text("{}")
    told = {"made_by": "x", "contents": [], "adapter": "another", "original": "a model", "audit": 3, "files": files}
    (done / MARK).write_text(json.dumps(told))
    study._take_original(ground, run, folder)
    assert {p.name for p in staging_folder(folder).iterdir()} == {MARK, "formats.open.original.json"}
    found = json.loads((staging_folder(folder) / MARK).read_text())
    assert found.keys() == {"adapter", "original", "audit", "files"} and found["original"] is None
    assert found["adapter"] == hashlib.sha256(b"x").hexdigest()


def test_the_table_says_what_was_found_beside_the_control() -> None:
    rows = [
        row("formats", "open", "leak", 0.5, 0.0),
        row("formats", "cloze", "leak", 0.5, 0.0),
        row("layers", "lens", "no lead", 0.3, 0.1),
        row("layers", "probe", "no lead", 0.2, 0.1),
        row("relearning", "half", "inconclusive", 0.9, 0.5),
        row("collateral", "retain", "shown", 0.98, 0.9),
    ]
    leaks = ["formats.open", "formats.cloze"]
    lines = study.table([result("npo", leaks, rows), result("ga", [], rows[2:])]).splitlines()
    assert lines[2].startswith("| ga | done | 0 of 2 |")  # fewer leaks first
    assert lines[3] == (
        "| npo | done | 2 of 4 | 50 / 0 | – / – | – / – | 40 [30, 50] (inconclusive) | 30 / 10 | 20 / 10 "
        "| – / – | – / – | 98 | – | formats (2) |"
    )
    assert lines[2].endswith("| none |")
