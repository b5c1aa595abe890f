"""The study of objectives under the audit: what is done is not done again, and the table says what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import audit_objectives as study


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


def test_the_table_says_what_was_found_beside_the_control() -> None:
    rows = [
        row("formats", "open", "leak", 0.5, 0.0),
        row("formats", "cloze", "leak", 0.5, 0.0),
        row("layers", "lens", "no lead", 0.3, 0.1),
        row("relearning", "half", "inconclusive", 0.9, 0.5),
        row("collateral", "retain", "shown", 0.98, 0.9),
    ]
    leaks = ["formats.open", "formats.cloze"]
    lines = study.table([result("npo", leaks, rows), result("ga", [], rows[2:])]).splitlines()
    assert lines[2].startswith("| ga | done | 0 of 1 |")  # fewer leaks first
    assert lines[3] == (
        "| npo | done | 2 of 3 | 50 / 0 | – / – | – / – | 40 [30, 50] (inconclusive) | 30 / 10 | 98 | – | formats (2) |"
    )
    assert lines[2].endswith("| none |")
