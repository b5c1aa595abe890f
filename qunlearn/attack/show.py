"""Print an audit: a line an attack with the subjects side by side, a line a family, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qunlearn.attack.catalog import FAMILIES
from qunlearn.attack.cells import ORIGINAL, UNLEARNED
from qunlearn.report.audit import VERDICTS, families
from qunlearn.utils.console import Column, say, table


def show(result: Mapping[str, Any], *, to_stdout: bool) -> None:
    """The table an engineer reads, and one of the families and the sentences for everybody else."""
    subjects = [ORIGINAL, UNLEARNED, result["baseline"]]
    columns = [Column("", right=False), Column("attack", right=False), *map(Column, subjects)]
    columns += [Column("lead [95 %]"), Column("p, corrected"), Column("verdict", right=False)]
    rows, before = [], ""
    for row in result["rows"]:
        title = f"{row['letter']} {FAMILIES[row['family']].title}"
        chance = f" (chance {100 * row['chance']:.0f})" if row["chance"] else ""
        p = row["p_corrected"]
        shares = [_percent(row["shares"].get(s)) for s in subjects]
        p_text = "" if p is None else f"{p:.3f}"
        rows.append(
            [title if title != before else "", row["title"] + chance, *shares, lead(row), p_text, row["verdict"]]
        )
        before = title
    title = f"{result['model']}, {result['facts']} facts, budget {result['budget']}: % that come back, or AUC in %"
    table(title, columns, rows, to_stdout=to_stdout)
    columns = [Column("family", right=False), *map(Column, VERDICTS), Column("worst", right=False)]
    columns += [Column("its lead"), Column("would be found")]
    lines = [
        [
            line["name"],
            *(str(n) if n else "" for n in line["counts"]),
            line["worst"],
            line["lead"][0],
            line["detectable"],
        ]
        for line in families(result["rows"])
    ]
    table("By family: attacks by what came of them, in points", columns, lines, to_stdout=to_stdout)
    for note in result["notes"]:
        say(note, style="dim")
    for i, sentence in enumerate(result["sentences"]):
        say(sentence, style="bold" if i == 0 else None)


def _percent(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    text = f"{100 * found['mean']:.0f}"
    return text if found["low"] is None else f"{text} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def lead(row: Mapping[str, Any]) -> str:
    """Return by how many points the unlearned model is above its control."""
    return _percent(row["lead"])
