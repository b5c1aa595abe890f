"""The bench of objectives: what is done is not done again, results belong to settings, the page and picture follow."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

import _objectives_page as page
import bench_rows as rows
import objectives
import requantize
from _trials import Trial
from qunlearn.config.objective import OBJECTIVE_NAMES
from qunlearn.sandbox import KINDS

MACHINE = {"date": "2026-01-02", "device": "cpu", "torch": "1", "transformers": "2", "peft": "3", "bitsandbytes": "4"}


def result(trial: Trial, **changed: Any) -> dict[str, Any]:
    figures = {"forget": 0.0, "paraphrase": 2.5, "retain": 99.0, "holdout": 97.5, "perplexity": 1.01, "ks_p": 0.2}
    figures |= {"tells_forget": 0.0, "tells_paraphrase": 5.0}
    figures |= {"p_bad": 0.1, "drift": 0.01, "step": 40, "steps": 60, "train_seconds": 9.0, "peak_bytes": 3 << 20}
    named = {"objective": trial.objective, "kind": trial.kind, "seed": trial.seed, "settings": trial.settings()}
    return {"version": objectives.VERSION, **named, **figures, "machine": MACHINE, **changed}


def test_a_result_belongs_to_its_settings() -> None:
    plain, other = Trial("npo", "harm", 1, {}), Trial("npo", "harm", 1, {"objective.beta": 0.5})
    assert objectives.is_done(plain, [result(plain)])
    for different in (other, Trial("npo", "harm", 2, {}), Trial("npo", "code", 1, {}), Trial("dpo", "harm", 1, {})):
        assert not objectives.is_done(plain, [result(different)])
    older = result(plain)
    del older["settings"]["train.clip"]  # a setting that came later
    assert objectives.is_done(plain, [older])
    unread = Trial("npo", "harm", 1, {"objective.delta": 7, "objective.steer": 3})
    assert objectives.is_done(plain, [result(unread)]) and not objectives.is_done(
        Trial("simnpo", "harm", 1, {}), [result(Trial("simnpo", "harm", 1, {"objective.delta": 7}))]
    )
    assert result(Trial("ga", "harm", 0, {}))["settings"]["objective.floor_nll"] == "inf"  # JSON knows none


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    path, trials = tmp_path / "r.jsonl", [Trial("npo", "harm", seed, {}) for seed in (0, 1)]
    for trial in trials:
        objectives.append(result(trial), path)
    whole = path.read_text()
    path.write_text(whole[:-30])
    assert [objectives.is_done(t, objectives.read_results(path)) for t in trials] == [True, False]
    objectives.append(result(trials[1]), path)
    assert all(objectives.is_done(t, objectives.read_results(path)) for t in trials)
    objectives.append({**result(trials[0]), "version": -1}, path)
    assert len(objectives.read_results(path)) == 2


def test_the_page_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "objectives.md"
    path.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "PAGE", path)
    done = [result(Trial(name, kind, 0, {}), holdout=90.0 + i)
            for i, name in enumerate(OBJECTIVE_NAMES[:9]) for kind in KINDS]  # fmt: skip
    done += [
        result(Trial("simnpo", "code", 1, {}), holdout=60.0),
        result(Trial("npo", "harm", 0, {"objective.beta": 7})),
    ]
    done.append(result(Trial("ga", "code", 1, {}), failed="no more numbers"))
    page.render(done, objectives.is_of)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert "| `simnpo` | code | 0, 1 | 0.0 | 2.5 | 0.0 | 5.0 | 99.0 | 78.0 (60.0) |" in text
    assert "| `npo` | harm | 0 | beta 7.0 |" in text
    assert "| `ga` | 5 (1 failed) |" in text
    picture = (tmp_path / page.PICTURE).read_text()
    root = ET.fromstring(picture)
    texts = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*KINDS} <= texts and "simnpo" in " ".join(t for t in texts if t)
    page.render(done, objectives.is_of)
    assert (tmp_path / page.PICTURE).read_text() == picture


@pytest.mark.medium
def test_every_objective_passes_the_same_tokens() -> None:
    found = rows.race(rows.TINY, torch.device("cpu"), 1)
    tokens = {name: figures["tokens"] for name, figures in found.items()}
    without = tokens.pop("ga")  # no retain side
    assert tokens.pop("logodds") > tokens["llmu"]  # its second answer stands in a term of its own
    assert len(set(tokens.values())) == 1
    assert without < tokens["llmu"] == tokens["mollm"]  # two losses on normal rows, which go forward once
    for figures in found.values():
        figures["peak_bytes"] = 1 << 20
    assert "| `llmu` | " in rows.row_table(found) and rows.row_table(found).count("\n") == len(OBJECTIVE_NAMES) + 1


def test_what_came_back_is_told_by_form() -> None:
    def run(name: str, kind: str, back: list[str]) -> dict[str, Any]:
        scores = {form: {"probability": 0.02, "exact_match": 0.05} for form in requantize.FORMS}
        told = {"back, original": [], "back, dequantized": back}
        return {"row": name, "kind": kind, "step": 220, "change": 0.0312, **scores, **told, "machine": MACHINE}

    lines = requantize.text([run("npo", "code", ["nf4"]), run("wga", "code", [])]).splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| `wga`", "| `npo`"]  # in the order of the rows
    assert lines[-1].endswith("| 0.031 |" + " 0.0200 (5) |" * 5 + " nf4, dequantized |") and lines[-2].endswith("| – |")
