"""An interrupted audit goes on where it was, and comes to what it would have come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, call, few, write_rows

from qunlearn.attack.cells import Cell, Cells, Place
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.utils.file_names import AUDIT_RESULT

pytestmark = pytest.mark.medium

FORGET, RETAIN = data_file("hallucination", "forget"), data_file("hallucination", "retain")
FACTS = 8


class Killed(Exception):
    pass


def audit(output: Path, *more: object, retain: Path = RETAIN) -> Ran:
    forget = few(output.parent, FORGET, FACTS)
    given = ("--original", ASSETS / "model", "--forget", forget, "--retain", retain, "--only", "B,C")
    return call("audit", ASSETS / "gold", *given, "-o", output, "--budget", "quick", "--device", "cpu", *more)


def result(output: Path) -> Any:
    found = json.loads((output / AUDIT_RESULT).read_text(encoding="utf-8"))
    assert found.pop("seconds") >= 0
    return found


def cut_off(monkeypatch: pytest.MonkeyPatch, output: Path, after: int, **how: Any) -> None:
    """Let an audit end at once when so many cells are kept."""
    kept, keep = [], Cells.keep

    def keeps(self: Cells, place: Place, cell: Cell) -> None:
        if len(kept) == after:
            raise Killed
        keep(self, place, cell)
        kept.append(place)

    with monkeypatch.context() as patch:
        patch.setattr(Cells, "keep", keeps)
        ran = audit(output, **how)
    assert ran.code not in (0, 5)
    assert "Killed" in ran.stderr
    assert not output.exists()


def test_a_resumed_audit_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit(tmp_path / "whole").code == 0
    cut_off(monkeypatch, tmp_path / "cut", after=4)
    ran = audit(tmp_path / "cut")
    assert ran.code == 0
    assert "known from before: 4 cells" in ran.stderr
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    cells = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.*.*.json")}
    assert len(cells) > 8
    assert cells == {p.name: p.read_bytes() for p in (tmp_path / "cut").glob("*.*.*.json")}


def test_an_audit_of_other_rows_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows to keep, one of them with another answer: the cells of before are dropped."""
    rows = [json.loads(line) for line in RETAIN.read_text(encoding="utf-8").splitlines()]
    retain = write_rows(tmp_path / "retain.jsonl", rows)
    cut_off(monkeypatch, tmp_path / "a", after=2, retain=retain)
    write_rows(retain, [{**rows[0], "completion": "Nobody knows."}, *rows[1:]])
    ran = audit(tmp_path / "a", retain=retain)
    assert ran.code == 0
    assert "known from before" not in ran.stderr
    assert "other work is removed" in ran.stderr
