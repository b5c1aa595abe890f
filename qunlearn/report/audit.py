"""The report's section on an audit: its verdict, a line a family, and how much comes back in every format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError
from qunlearn.utils.file_names import AUDIT, AUDIT_RESULT
from qunlearn.utils.json_files import LARGE_BYTES, misfit, read_object

_NUMBER = (int, float)
_SHAPE = {
    "status": str, "baseline": str, "budget": str, "facts": int, "tolerance": _NUMBER, "sentences": [str], "rows": list,
    "keys?": [str], "fact_units?": [int],
}  # fmt: skip
_ROW = {
    "family": str, "letter": str, "format": str, "title": str, "verdict": str, "shares": dict,
    "detectable?": (*_NUMBER, type(None)), "aside?": str,
}  # fmt: skip
_ESTIMATE = {"n": int, "mean": _NUMBER}
_HINT = "audit it again with `qunlearn audit --overwrite`"
VERDICTS = ("leak", "inconclusive", "blind", "no lead", "shown")
TOO_FEW = "too few facts to tell"  # the status of an audit in which no attack could have told a leak from chance
_ENDS = ("low", "high")
_UNGUARDED = "unguarded"  # a row of the model with its guard off, which is shown and does not decide
_HEATS = 5  # shades of a cell


def find_audit(folder: Path) -> Path | None:
    """Return the audit folder that a folder is, or that the run in it has; None where there is none."""
    return next((place for place in (folder, folder / AUDIT) if (place / AUDIT_RESULT).is_file()), None)


def read_audit(folder: Path) -> Mapping[str, Any] | None:
    """Return what the audit of a run, or in a folder of its own, came to; None where there is none. Raises
    AdapterError."""
    place = find_audit(folder)
    if place is None:
        return None
    path = place / AUDIT_RESULT
    found = read_object(path, AdapterError, hint=_HINT, most_bytes=LARGE_BYTES, shape=_SHAPE)
    for i, row in enumerate(found["rows"]):
        wrong = misfit(row, _ROW) or _wrong_estimates(row)
        if wrong is not None:
            raise AdapterError(f"not what it should hold: rows.{i}: {wrong}", where=str(path), hint=_HINT)
    return found


def _wrong_estimates(row: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a row's numbers; the interval may be absent, and the lead."""
    named = {**{f"shares.{name}": value for name, value in row["shares"].items()}, "lead": row.get("lead")}
    for name, value in named.items():
        if value is None:
            continue
        wrong = misfit(value, _ESTIMATE)
        if wrong is not None:
            return f"{name}: {wrong}"
        if any(isinstance(value.get(k), bool) or not isinstance(value.get(k), (*_NUMBER, type(None))) for k in _ENDS):
            return f"{name}: low and high must be numbers"
    return None


def audit_section(found: Mapping[str, Any], plain: Callable[[object], str]) -> dict[str, Any]:
    """Return what the page shows of an audit: headline, sentences, families, and every attack by its subjects.

    `plain` takes out of the sentences and titles of a file what would not be seen on the page.
    """
    rows = [{**row, "title": plain(row["title"]), "family": plain(row["family"])} for row in found["rows"]]
    in_place = [row for row in rows if row.get("aside") != _UNGUARDED]
    leaks = sum(row["verdict"] == "leak" for row in in_place)
    over = found["status"] == "leaks"
    judged = sum(row["verdict"] in ("leak", "no lead") for row in in_place)
    if over:
        headline = f"The audit found leaks: {leaks} of {judged} attacks beat their control"
    elif leaks:
        headline = f"{leaks} of {judged} attacks beat their control, within the tolerance"
    elif found["status"] == TOO_FEW:
        headline = "The audit had too few facts to tell a leak from chance"
    else:
        headline = "No attack of the audit beat its control by more than chance"
    subjects = [s for s in ("original", "unlearned", found["baseline"]) if any(s in row["shares"] for row in rows)]
    return {
        "headline": headline,
        "colour": "bad" if over else "warn" if leaks else "plain",
        "sentences": [plain(sentence) for sentence in found["sentences"]],
        "about": f"Budget {plain(found['budget'])}, {found['facts']} facts, tolerance {100 * found['tolerance']:g} %.",
        "verdicts": VERDICTS,
        "families": families(rows),
        "subjects": subjects,
        "rows": [_line(row, subjects) for row in rows],
    }


def audit_line(found: Mapping[str, Any]) -> str:
    """Return an audit in one line: how many attacks beat their control, and the worst of them."""
    judged = [row for row in found["rows"] if row["verdict"] in ("leak", "no lead") and row.get("aside") != _UNGUARDED]
    leaks = [row for row in judged if row["verdict"] == "leak" and row.get("lead")]
    beside = "placebo facts" if found["baseline"] == "placebo" else "a model that never saw the facts"
    line = f"audit ({found['budget']}, beside {beside}): {len(leaks)} of {len(judged)} attacks beat their control"
    if found["status"] == TOO_FEW:
        return f"{line}; {TOO_FEW}"
    if not leaks:
        return f"{line}; suppression is no proof of removal"
    worst = max(leaks, key=lambda row: row["lead"]["mean"])
    return f"{line}; the worst, {worst['title']}, by {100 * worst['lead']['mean']:.0f} points"


def families(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a line a family: its verdicts counted, its worst attack, and the smallest lead it would have found."""
    in_place = [row for row in rows if row.get("aside") != _UNGUARDED]
    return [_family(family, in_place) for family in dict.fromkeys(row["family"] for row in in_place)]


def _family(family: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["family"] == family]
    counts = Counter(row["verdict"] for row in own)
    led = [row for row in own if row.get("lead") and row["verdict"] in ("leak", "no lead")]
    worst = max(led, key=lambda row: row["lead"]["mean"], default=None)
    seen = [row["detectable"] for row in own if row.get("detectable") is not None and row.get("aside") is None]
    return {
        "name": f"{own[0]['letter'][:1]} {family}",
        "counts": [counts[verdict] for verdict in VERDICTS],
        "worst": "" if worst is None else worst["title"],
        "lead": ("", "") if worst is None else _percent(worst["lead"], signed=True),
        "detectable": "" if not seen else f"{100 * min(seen):.0f}",
    }


def _line(row: Mapping[str, Any], subjects: list[str]) -> dict[str, Any]:
    return {
        "family": row["family"],
        "title": row["title"],
        "cells": [_heat(row["shares"].get(subject)) for subject in subjects],
        "lead": _percent(row.get("lead"), signed=True),
        "verdict": row["verdict"],
        "class": row["verdict"].replace(" ", "-") if row["verdict"] in VERDICTS else "shown",
    }


def _heat(found: Mapping[str, Any] | None) -> tuple[str, str, int]:
    """(value, interval, shade from 0 to _HEATS)."""
    if found is None:
        return "", "", 0
    shade = round(_HEATS * min(1.0, max(0.0, found["mean"])))
    return (*_percent(found), shade)


def _percent(found: Mapping[str, Any] | None, *, signed: bool = False) -> tuple[str, str]:
    """(value, interval) in percent."""
    if found is None:
        return "", ""
    form = "+.0f" if signed else ".0f"
    ends = [found.get(end) for end in _ENDS]
    interval = "" if None in ends else " – ".join(f"{100 * end:{form}}" for end in ends if end is not None)
    return f"{100 * found['mean']:{form}}", interval
