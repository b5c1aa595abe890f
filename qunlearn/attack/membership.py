"""Family E: do the facts still look like something that was trained on, beside rows that never were?"""

from __future__ import annotations

from collections.abc import Sequence

from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import CONTROL, Cell
from qunlearn.data.tokenize import Example
from qunlearn.evaluation.metrics import TokenStats
from qunlearn.evaluation.scores import token_stats


def run(bench: Bench, name: str) -> Cell:
    """Return a fact's score, higher for what looks trained on, and in `more` those of the holdout rows.

    loss: mean log p; zlib: log p per byte of the compressed text; min-k, min-k++: see metrics/tokens.py. The formulas
    of `reference` are nats per token above the control's, which a later call to `referred` makes of `loss`.
    """
    facts = [bench.encode(fact.record) for fact in bench.facts]
    others = [bench.encode(record) for record in bench.inputs.holdout if record.turns]
    scores = [[_score(s, name) for s in _stats(bench, rows)] for rows in (facts, others)]
    return Cell(scores[0], {"others": scores[1], "tokens": [e.end - e.start for e in (*facts, *others)]})


def _stats(bench: Bench, rows: Sequence[Example]) -> list[TokenStats]:
    return token_stats(bench.lm, rows, bench.config.train.max_tokens)


def _score(s: TokenStats, name: str) -> float:
    if name == "zlib":
        return -s.nll / s.zlib_bytes
    if name in ("min-k", "min-k++"):
        return s.min_k if name == "min-k" else s.min_k_plus
    return -s.nll / s.tokens


def referred(cell: Cell, control: Cell) -> Cell:
    """Return the reference scores of a subject: its mean log p above the control's, on the same rows."""
    scores = [None if a is None or b is None else a - b for a, b in zip(cell.outcomes, control.outcomes, strict=True)]
    others = [a - b for a, b in zip(cell.more["others"], control.more["others"], strict=True)]
    return Cell(scores, {"others": others, "against": CONTROL})
