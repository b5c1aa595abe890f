"""The report's section on an audit: there where one lies in the run, and as safe as the rest of the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from test_report import HOSTILE, check_safe, evaluation

from qunlearn.report.page import render
from qunlearn.report.read import read_story
from qunlearn.utils.file_names import AUDIT, AUDIT_RESULT, EVAL

NOT_TRIED = "No attack was tried"


def row(family: str, name: str, verdict: str, lead: float | None, unlearned: float) -> dict[str, Any]:
    def estimate(mean: float) -> dict[str, Any]:
        return {"n": 40, "mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    shares = {"original": estimate(1.0), "unlearned": estimate(unlearned), "control": estimate(0.05)}
    found = {"family": family, "letter": "A", "format": name, "title": f"{name} question", "verdict": verdict}
    return {**found, "shares": shares, "lead": None if lead is None else estimate(lead)}


def audit() -> dict[str, Any]:
    rows = [
        row("formats", "open", "no lead", -0.05, 0.0),
        row("formats", "prefix4", "leak", 0.82, 0.87),
        row("layers", HOSTILE[1], "shown", None, 0.5),
    ]
    return {
        "status": "leaks", "baseline": "control", "budget": "quick", "facts": 40, "tolerance": 0.0, "rows": rows,
        "sentences": ["Found out by: prefix4 question.", HOSTILE[0], HOSTILE[4]],
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[dict[str, Any] | None], Path]:
    def make(found: dict[str, Any] | None) -> Path:
        (tmp_path / EVAL).write_text(json.dumps({"suites": {"basic": evaluation(["a"])}, "latest": "basic"}))
        if found is not None:
            (tmp_path / AUDIT).mkdir()
            (tmp_path / AUDIT / AUDIT_RESULT).write_text(json.dumps(found))
        return tmp_path

    return make


def test_an_audit_is_shown(make_run: Callable[..., Path]) -> None:
    page = render(read_story(make_run(audit())), include_samples=False)
    found = check_safe(page)
    assert NOT_TRIED not in found.text
    assert "The audit found leaks: 1 of 2 attacks beat their control" in found.text
    assert "A formats 1 1 +82 +72 – +92 prefix4 question" in found.text
    assert f"{HOSTILE[1]} question" in found.text  # as a text
    assert not set("\u202e\u2066\x00\x1b") & set(page)
    shades = [a["class"] for tag, a in found.tags if tag == "td" and str(a.get("class", "")).startswith("heat-")]
    assert shades == ["heat-5", "heat-0", "heat-0", "heat-5", "heat-4", "heat-0", "heat-5", "heat-2", "heat-0"]


def test_without_an_audit_the_page_says_that_nothing_was_tried(make_run: Callable[..., Path]) -> None:
    found = check_safe(render(read_story(make_run(None)), include_samples=False))
    assert NOT_TRIED in found.text
    assert "Audit" not in found.text


@pytest.mark.parametrize(
    ("status", "verdict", "headline"),
    [
        ("no leak found", "leak", "1 of 2 attacks beat their control, within the tolerance"),
        ("no leak found", "inconclusive", "No attack of the audit beat its control by more than chance"),
    ],
)
def test_the_headline_follows_the_verdict(
    make_run: Callable[..., Path], status: str, verdict: str, headline: str
) -> None:
    made = {**audit(), "status": status}
    made["rows"][1]["verdict"] = verdict
    assert headline in check_safe(render(read_story(make_run(made)), include_samples=False)).text


def _change(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    made = audit()
    change(made)
    return made


@pytest.mark.parametrize(
    "damaged",
    [
        _change(lambda r: r.pop("rows")),
        _change(lambda r: r.update(sentences=[1])),
        _change(lambda r: r["rows"].append([])),
        _change(lambda r: r["rows"][0].pop("verdict")),
        _change(lambda r: r["rows"][0]["shares"].update(unlearned={"n": 3})),
        _change(lambda r: r["rows"][0]["shares"]["original"].update(low="much")),
        _change(lambda r: r["rows"][0].update(lead=[])),
    ],
)
def test_a_damaged_audit_is_refused_by_name(make_run: Callable[..., Path], damaged: dict[str, Any]) -> None:
    ran = call("report", make_run(damaged))
    assert ran.code == 6
    assert AUDIT_RESULT in ran.stderr


def test_the_audit_is_not_written_over(make_run: Callable[..., Path]) -> None:
    run = make_run(audit())
    before = (run / AUDIT / AUDIT_RESULT).read_bytes()
    for name in (AUDIT_RESULT, "page.html"):
        assert call("report", run, "-o", run / AUDIT / name, "--overwrite").code == 9
    assert (run / AUDIT / AUDIT_RESULT).read_bytes() == before
    assert not (run / AUDIT / "page.html").exists()
