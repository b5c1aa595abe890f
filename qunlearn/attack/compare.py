"""Set audits side by side: families, worst cells, and whether the formats rank two models alike. Reads files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from qunlearn.attack.catalog import FAMILIES
from qunlearn.attack.cells import UNLEARNED, Place
from qunlearn.attack.sentences import CLEAN, LEAK
from qunlearn.attack.statistics import ALPHA, as_numbers, holm, lead_of, pairs
from qunlearn.errors import AdapterError, ConfigError
from qunlearn.evaluation.metrics.stats import paired_test
from qunlearn.report.audit import find_audit, read_audit
from qunlearn.utils.console import Column, say, table
from qunlearn.utils.json_files import LARGE_BYTES, read_object

_PAIRED = ("formats", "prompts", "weights", "layers")  # an outcome a fact, on one scale
_RANKED = ("formats", "prompts")
_FEWEST = 3  # formats of which an order says anything


@dataclass(frozen=True)
class Audit:
    """An audit that is compared: its name, its folder, what audit.json holds."""

    name: str
    folder: Path
    found: Mapping[str, Any]

    @property
    def rows(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        return {(row["family"], row["format"]): row for row in self.found["rows"]}

    def outcomes(self, family: str, form: str) -> dict[str, float | None]:
        """Return the unlearned model's outcome of each fact, by the fact's key; empty where the cell is not there."""
        path = self.folder / Place(family, form, UNLEARNED).file
        keys = self.found.get("keys", [])
        if not path.is_file():
            return {}
        values = read_object(path, AdapterError, most_bytes=LARGE_BYTES, shape={"outcomes": [(float, int, type(None))]})
        return dict(zip(keys, values["outcomes"], strict=False))

    @property
    def units(self) -> dict[str, int]:
        keys = self.found.get("keys", [])
        return dict(zip(keys, self.found.get("fact_units", range(len(keys))), strict=False))


def open_audit(folder: Path, name: str) -> Audit:
    """Read the audit in a folder, or in the run that the folder is. Raises AdapterError, ConfigError."""
    place, found = find_audit(folder), read_audit(folder)
    if place is None or found is None:
        raise ConfigError("has not been audited", where=str(folder), hint="run `qunlearn audit` on it first")
    return Audit(name, place, found)


def compare_audits(folders: Sequence[Path], names: Sequence[str], *, to_stdout: bool) -> dict[str, Any]:
    """Return and show what several audits found, each beside the first. Raises QunlearnErrors.

    Differences are of the unlearned models on the facts that both audits asked, paired; their two-sided p-values are
    corrected together (Holm).
    """
    if len(folders) < 2:
        raise ConfigError("two at least are needed to compare", where="compare", hint="qunlearn compare A B")
    audits = [open_audit(folder, name) for folder, name in zip(folders, names, strict=True)]
    common = [key for key in audits[0].rows if all(key in audit.rows for audit in audits)]
    if not common:
        hint = "audit them with one --budget, and without --only"
        raise ConfigError("no attack was run on all of them", where="compare", hint=hint)
    compared = {
        "first": audits[0].name,
        "runs": [audit.name for audit in audits],
        "budgets": [audit.found["budget"] for audit in audits],
        "baselines": [audit.found["baseline"] for audit in audits],
        "facts": len(set.intersection(*(set(audit.found.get("keys", ())) for audit in audits))),
        "families": [_family(audits, family, common) for family in dict.fromkeys(family for family, _ in common)],
        "rows": _rows(audits, common),
        "worst": [_worst(audit.rows.values()) for audit in audits],
        "rank": [_rank(a, b, common) for a, b in combinations(audits, 2)],
    }
    _show(compared, to_stdout=to_stdout)
    return compared


# -- numbers -----------------------------------------------------------------------------------------------


def tau_b(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two rankings: (C - D) / sqrt((n - ties in one) (n - ties in the other)), over all n
    pairs, of which C are in the same order in both and D in the opposite. None where one side has no order at all.

    Source: M. G. Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945).
    """
    signs = [
        (math.copysign(1, a - b) if a != b else 0.0, math.copysign(1, c - d) if c != d else 0.0)
        for (a, c), (b, d) in combinations(list(zip(first, second, strict=True)), 2)
    ]
    untied = [sum(pair[side] != 0 for pair in signs) for side in (0, 1)]
    return sum(a * b for a, b in signs) / math.sqrt(untied[0] * untied[1]) if all(untied) else None


def _rank(first: Audit, second: Audit, common: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """How alike the formats rank by their lead over the control: do those that find one out find the other out?"""
    leads = [[audit.rows[key].get("lead") for key in common if key[0] in _RANKED] for audit in (first, second)]
    both = [(a["mean"], b["mean"]) for a, b in zip(*leads, strict=True) if a is not None and b is not None]
    tau = tau_b([a for a, _ in both], [b for _, b in both]) if len(both) >= _FEWEST else None
    return {"runs": [first.name, second.name], "formats": len(both), "tau": tau}


def _family(audits: Sequence[Audit], family: str, common: Sequence[tuple[str, str]]) -> dict[str, Any]:
    rows = [[audit.rows[key] for key in common if key[0] == family] for audit in audits]
    return {
        "family": family,
        "leaks": [sum(row["verdict"] == LEAK for row in own) for own in rows],
        "judged": [sum(row["verdict"] in (LEAK, CLEAN) for row in own) for own in rows],
        "worst": [_worst(own) for own in rows],
    }


def _worst(rows: Any) -> dict[str, Any] | None:
    """The judged attack with the largest lead over its control, a leak or not."""
    judged = [row for row in rows if row["verdict"] in (LEAK, CLEAN) and row.get("lead") is not None]
    if not judged:
        return None
    worst = max(judged, key=lambda row: row["lead"]["mean"])
    return {
        "attack": f"{worst['family']}.{worst['format']}",
        "title": worst["title"],
        "lead": worst["lead"]["mean"],
        "verdict": worst["verdict"],
    }


def _rows(audits: Sequence[Audit], common: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    rows = []
    for family, form in common:
        found = [audit.rows[family, form] for audit in audits]
        differences = [
            _difference(audits[0], audit, family, form) if family in _PAIRED else None for audit in audits[1:]
        ]
        rows.append(
            {
                "family": family,
                "format": form,
                "title": found[0]["title"],
                "shares": [row["shares"].get(UNLEARNED) for row in found],
                "verdicts": [row["verdict"] for row in found],
                "differences": differences,
            }
        )
    tested = [d for row in rows for d in row["differences"] if d is not None]
    for difference, p in zip(tested, holm([d["p"] for d in tested]), strict=True):
        difference |= {"p_corrected": p, "beyond_noise": p < ALPHA}
    return rows


def _difference(first: Audit, other: Audit, family: str, form: str) -> dict[str, Any] | None:
    """Other minus first, paired over the facts of both; None where they share none."""
    ours, theirs = first.outcomes(family, form), other.outcomes(family, form)
    keys, units = [key for key in ours if key in theirs], first.units
    a, b = pairs([units[key] for key in keys], [ours[key] for key in keys], [theirs[key] for key in keys])
    if not a:
        return None
    p = min(1.0, 2 * min(paired_test(b, a), paired_test(a, b)))
    return {**(as_numbers(lead_of(b, a)) or {}), "p": p}


# -- showing -----------------------------------------------------------------------------------------------


def _show(compared: Mapping[str, Any], *, to_stdout: bool) -> None:
    runs = compared["runs"]
    columns = [Column("", False), Column("attack", False), *(Column(name) for name in runs)]
    columns += [Column(f"{name} - {runs[0]}") for name in runs[1:]]
    lines, last = [], None
    for row in compared["rows"]:
        title = f"{FAMILIES[row['family']].letter} {row['family']}" if row["family"] in FAMILIES else row["family"]
        shares = [_share(share, verdict) for share, verdict in zip(row["shares"], row["verdicts"], strict=True)]
        lines.append([title if title != last else "", row["title"], *shares, *map(_told, row["differences"])])
        last = title
    title = "audits: % that come back (! a leak); difference [95 %] in points, * beyond noise"
    table(title, columns, lines, to_stdout=to_stdout)
    for i, name in enumerate(runs):
        leaks = sum(family["leaks"][i] for family in compared["families"])
        judged = sum(family["judged"][i] for family in compared["families"])
        worst = compared["worst"][i]
        told = "" if worst is None else f"; the worst, {worst['title']}, leads by {100 * worst['lead']:.0f} points"
        say(f"{name}: {leaks} of {judged} attacks that all were put to beat their control{told}.")
    for rank in compared["rank"]:
        _say_rank(rank)
    if len(set(compared["baselines"])) > 1 or len(set(compared["budgets"])) > 1:
        say("Their controls or budgets differ: verdicts are not of one kind; the differences are.")
    say(f"{compared['facts']} facts were asked in all of them.")


def _say_rank(rank: Mapping[str, Any]) -> None:
    between = f"Formats by lead, {rank['runs'][0]} and {rank['runs'][1]}"
    if rank["tau"] is None:
        say(f"{between}: no order to compare ({rank['formats']} formats).")
    else:
        say(f"{between}: Kendall's tau-b {rank['tau']:+.2f} over {rank['formats']} formats (1: ranked alike).")


def _share(share: Mapping[str, Any] | None, verdict: str) -> str:
    return "" if share is None else f"{100 * share['mean']:.0f} {'!' if verdict == LEAK else ' '}"


def _told(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    ends = "" if found["low"] is None else f" [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"
    return f"{100 * found['mean']:+.0f}{ends} {'*' if found['beyond_noise'] else ' '}"
