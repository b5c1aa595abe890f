"""Family E: do the facts still look like something that was trained on, beside rows that never were?"""

from __future__ import annotations

from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import CONTROL, Cell
from qunlearn.evaluation.metrics.rows import MEMBERSHIP
from qunlearn.evaluation.scores import token_stats

_MEASURES = {
    "loss": "mia_loss", "reference": "mia_loss", "zlib": "mia_zlib", "min-k": "mia_min_k", "min-k++": "mia_min_k_plus",
}  # fmt: skip


def run(bench: Bench, name: str) -> Cell:
    """Return a fact's score, higher for what looks trained on, and in `more` those of the holdout rows.

    Formulas are in evaluation/metrics/membership.py; what a later call to `referred` makes `reference` of is `loss`.
    """
    facts = [bench.encode(fact.record) for fact in bench.facts]
    others = [bench.encode(record) for record in bench.inputs.holdout if record.turns]
    score = MEMBERSHIP[_MEASURES[name]]
    scores = [
        [score(s) for s in token_stats(bench.lm, rows, bench.config.train.pass_tokens)] for rows in (facts, others)
    ]
    return Cell(scores[0], {"others": scores[1], "tokens": [e.end - e.start for e in (*facts, *others)]})


def referred(cell: Cell, control: Cell) -> Cell:
    """Return the reference scores of a subject: its mean log p above the control's, on the same rows."""
    scores = [None if a is None or b is None else a - b for a, b in zip(cell.outcomes, control.outcomes, strict=True)]
    others = [a - b for a, b in zip(cell.more["others"], control.more["others"], strict=True)]
    return Cell(scores, {"others": others, "against": CONTROL})
