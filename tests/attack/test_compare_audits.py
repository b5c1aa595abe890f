"""Audits side by side: differences that are paired, ranks that are Kendall's, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, write_rows
from scipy import stats

from qunlearn.attack.compare import tau_b
from qunlearn.sandbox import ASSETS, data_file

pytestmark = pytest.mark.medium

FACTS = 24
TITLES = {"open": "open question", "cloze": "cloze", "prefix4": "first 4 tokens given"}


def write_audit(folder: Path, shares: dict[str, float], *, first: int = 0, baseline: str = "control") -> Path:
    """An audit in which so large a share of the facts comes back in each format, of the first; half is a leak."""
    folder.mkdir(parents=True)
    rows = []
    for name, share in shares.items():
        outcomes = [float(i < round(share * FACTS)) for i in range(FACTS)]
        cell = {"outcomes": outcomes, "more": {}}
        (folder / f"formats.{name}.unlearned.json").write_text(json.dumps(cell), encoding="utf-8")
        lead: dict[str, Any] = {"n": FACTS, "mean": share, "low": None, "high": None}
        verdict = "leak" if share >= 0.5 else "no lead"
        rows.append(
            {
                "family": "formats", "letter": "A", "format": name, "title": TITLES[name], "verdict": verdict,
                "shares": {"unlearned": lead}, "lead": lead,
            }
        )  # fmt: skip
    found = {
        "status": "leaks", "baseline": baseline, "budget": "quick", "facts": FACTS, "tolerance": 0.0, "sentences": [],
        "rows": rows, "keys": [f"k{first + i}" for i in range(FACTS)], "fact_units": list(range(FACTS)),
    }  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def test_tau_is_that_of_scipy_ties_and_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.integers(0, 4, 7).tolist(), rng.integers(0, 4, 7).tolist()
        expected = stats.kendalltau(x, y).statistic
        found = tau_b(x, y)
        assert (found is None) == bool(np.isnan(expected))
        if found is not None:
            assert found == pytest.approx(expected)
    assert tau_b([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1.0
    assert tau_b([1.0, 1.0], [1.0, 2.0]) is None


def test_differences_are_paired_and_corrected(tmp_path: Path) -> None:
    """Two models that swap their formats: the ranks are opposite, and a single fact is not told from chance."""
    a = write_audit(tmp_path / "a" / "audit", {"open": 0.0, "cloze": 0.5, "prefix4": 1.0})
    b = write_audit(tmp_path / "b" / "audit", {"open": 1.0, "cloze": 0.5 + 1 / FACTS, "prefix4": 0.0})
    found = call("compare", a.parent, b.parent, "--json").json
    assert set(found) == {"audits"}
    rows = {row["format"]: row for row in found["audits"]["rows"]}
    (opened,), (cloze,), (prefix,) = (rows[name]["differences"] for name in ("open", "cloze", "prefix4"))
    assert (opened["mean"], opened["beyond_noise"]) == (1.0, True)
    assert opened["p"] == pytest.approx(stats.binomtest(FACTS, FACTS).pvalue)
    assert (cloze["p"], cloze["beyond_noise"]) == (1.0, False)
    assert (prefix["mean"], prefix["beyond_noise"]) == (-1.0, True)
    assert found["audits"]["rank"] == [{"runs": ["a", "b"], "formats": 3, "tau": -1.0}]
    assert [worst["attack"] for worst in found["audits"]["worst"]] == ["formats.prefix4", "formats.open"]
    assert found["audits"]["families"][0]["leaks"] == [2, 2]
    shown = call("compare", a, b)  # the audits' own folders
    assert shown.code == 0 and "tau-b -1.00" in shown.stderr and "first 4 tokens given" in shown.stdout


def test_other_facts_are_not_paired(tmp_path: Path) -> None:
    a = write_audit(tmp_path / "a", {"open": 0.0})
    b = write_audit(tmp_path / "b", {"open": 1.0}, first=FACTS, baseline="placebo")
    ran = call("compare", a, b, "--json")
    assert ran.json["audits"]["rows"][0]["differences"] == [None]
    assert ran.json["audits"]["facts"] == 0
    assert "controls or budgets differ" in ran.stderr


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    a, b = write_audit(tmp_path / "a", {"open": 0.0}), write_audit(tmp_path / "b", {"cloze": 1.0})
    assert "no attack was run on all" in call("compare", a, b).stderr
    (tmp_path / "none").mkdir()
    assert "has not been evaluated" in call("compare", a, tmp_path / "none").stderr
    cell = a / "formats.open.unlearned.json"
    cell.write_text('{"outcomes": ["1"]}', encoding="utf-8")
    ran = call("compare", a, a)
    assert ran.code == 6 and str(cell) in ran.stderr.replace("\n", "")
    ran = call("audit", ASSETS / "gold", "--forget", data_file("harm", "forget"), "--compare", tmp_path / "none")
    assert ran.code == 2 and "has not been audited" in ran.stderr


def test_an_audit_is_set_beside_another_one(tmp_path: Path) -> None:
    facts = [json.loads(line) for line in data_file("hallucination", "forget").read_text("utf-8").splitlines()[:6]]
    forget = write_rows(tmp_path / "forget.jsonl", facts)
    how = ("--forget", forget, "--budget", "quick", "--only", "B", "--device", "cpu", "--json")
    first = call("audit", ASSETS / "gold", "-o", tmp_path / "a", *how)
    assert first.code == 0, first.stderr
    ran = call("audit", ASSETS / "model", "-o", tmp_path / "b", "--compare", tmp_path / "a", *how)
    compared = ran.json["compared"]
    assert compared["facts"] == len(facts)
    rows = {row["format"]: row for row in compared["rows"]}
    here = {row["format"]: row for row in ran.json["rows"]}
    for name, row in rows.items():
        assert row["shares"][1] == here[name]["shares"]["unlearned"]
        assert row["differences"][0]["n"] <= len(facts)
