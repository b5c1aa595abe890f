"""The table of objectives for people: `qunlearn objectives`, and docs/objectives.md made from the same rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qunlearn.config.objective import PRESETS
from qunlearn.config.resolve import resolve
from qunlearn.objectives.table import OBJECTIVES, Objective, Term, terms_of

_PASS = 3  # forward passes that a forward, a recomputation and a backward pass cost together
_MARKS = ("<!-- table: begin -->", "<!-- table: end -->")


def described() -> list[dict[str, Any]]:
    """Each row as plain values: name, formula, retain loss, what it needs, cost, own settings, source."""
    return [_described(name, row) for name, row in OBJECTIVES.items()]


def _described(name: str, row: Objective) -> dict[str, Any]:
    config = resolve(("row", {"objective.name": name})).objective
    # A row that says nothing instead trains on other answers only where the normal data gives any.
    unused = {"taught"} | ({"instead"} if config.instead == "nothing" else set())
    terms = tuple(t for t in terms_of(config) if t.role not in unused)
    return {
        "name": name,
        "forget": row.formula,
        "retain": row.retain + (" (steered)" if row.dual else ""),
        "needs": ", ".join(_needs(row, terms)) or "nothing",
        "cost": _cost(row, terms),
        "settings": {key.removeprefix("objective."): value for key, value in PRESETS[name].items()},
        "source": row.source,
    }


def _needs(row: Objective, terms: tuple[Term, ...]) -> list[str]:
    needs = []
    if any(t.reference and t.role != "retain" for t in terms):
        needs.append("reference on bad rows")
    if any(t.reference and t.role == "retain" for t in terms):
        needs.append("reference on normal rows")
    if row.alternatives:
        needs.append({"idk": "refusals (built in)", "own": "generated answers"}[row.alternatives])
    if any(t.role == "instead" for t in terms):
        needs.append("generated answers")
    if any(t.role in ("mismatch", "retain") for t in terms):
        needs.append("normal data")
    return needs


def _cost(row: Objective, terms: tuple[Term, ...]) -> int:
    """Forward units for one bad and one normal row: 3 for each trained pass, 1 for each live reference pass.

    Terms on the same rows share their passes, unless their gradients are kept apart; a pair is two rows.
    """
    rows = {"forget": 1, "mismatch": 1, "pair": 2, "instead": 1, "retain": 1}
    trained = [t.role for t in terms] if row.descent else list(dict.fromkeys(t.role for t in terms))
    reference = dict.fromkeys(t.role for t in terms if t.reference)
    return sum(_PASS * rows[role] for role in trained) + sum(rows[role] for role in reference)


def markdown_table() -> str:
    lines = ["| objective | forget side, minimised | retain | needs | cost | own settings | source |", "|" + "---|" * 7]
    for d in described():
        own = ", ".join(f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in d["settings"].items()) or "–"
        formula = d["forget"].replace("|", "\\|")
        cells = (f"`{d['name']}`", f"`{formula}`", d["retain"], d["needs"], str(d["cost"]), own, d["source"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page with its table made anew between the two marks."""
    before, _, rest = page.partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    return f"{before}{_MARKS[0]}\n{markdown_table()}\n{_MARKS[1]}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
