"""`forget --audit`: the run ends as it would without, and the audit lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Ran, call, few, sets

import qunlearn.attack.audit
from qunlearn.attack.catalog import BUDGETS
from qunlearn.attack.request import FEWEST
from qunlearn.config.settings import SETTINGS
from qunlearn.errors import DoesNotFitError
from qunlearn.report.audit import audit_line, read_audit
from qunlearn.sandbox import data_file

pytestmark = pytest.mark.medium

BAD = data_file("hallucination", "forget")


def forget(folder: Path, *more: object, bad: Path = BAD, **settings: Any) -> Ran:
    given = ("--model", "sandbox", "--bad", bad, "-o", folder, "--device", "cpu", "--json")
    return call("forget", *given, *more, *sets({**QUICK, **{f"train.{name}": v for name, v in settings.items()}}))


def test_the_budgets_are_those_of_an_audit() -> None:
    assert SETTINGS["output.audit"].choices == ("none", *BUDGETS)


@pytest.mark.slow
def test_a_run_ends_with_its_audit_and_its_own_exit_code(tmp_path: Path) -> None:
    """A dozen steps suppress the answers and leave them in the weights: a leak, and exit code 0 all the same."""
    run = tmp_path / "run"
    ran = forget(run, "--audit", "quick")
    assert ran.code == 0, ran.stderr
    found = read_audit(run)
    assert found is not None and found["status"] == ran.json["audit"]["status"] == "leaks"
    assert found["sentences"][0] in " ".join(ran.stderr.split())
    assert (run / "audit").stat().st_mode & 0o077 == 0
    assert f"of {sum(r['verdict'] in ('leak', 'no lead') for r in found['rows'])} attacks" in audit_line(found)
    written = (run / "audit" / "audit.json").stat().st_mtime_ns
    again = forget(run, "--audit", "quick", "--resume")
    assert again.code == 0 and "audit" not in again.json
    assert (run / "audit" / "audit.json").stat().st_mtime_ns == written


def test_too_few_rows_are_refused_before_the_run(tmp_path: Path) -> None:
    ran = forget(tmp_path / "run", "--audit", "quick", bad=few(tmp_path, BAD, FEWEST - 1))
    assert ran.code == 3 and "too few rows to be audited" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_outlives_its_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise DoesNotFitError("out of memory while attacking", where="audit")

    monkeypatch.setattr(qunlearn.attack.audit, "audit", fails)
    ran = forget(tmp_path / "run", "--audit", "quick", bad=few(tmp_path, BAD), seed=2)
    assert ran.code == 0, ran.stderr
    assert ran.json["audit"] == {"budget": "quick", "status": "not audited", "why": "out of memory while attacking"}
    assert "qunlearn audit" in ran.stderr and (tmp_path / "run" / "adapter").is_dir()
