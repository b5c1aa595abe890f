"""Family F: what unlearning cost, on rows that should stay, by how close they are to what should go."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import Cell
from qunlearn.attack.facts import at_most, keywords
from qunlearn.data.batch import ALL
from qunlearn.data.records import Record
from qunlearn.data.tokenize import decode
from qunlearn.data.words import words_of_text
from qunlearn.evaluation.metrics.verdicts import is_refusal, leaks
from qunlearn.evaluation.scores import row_nlls
from qunlearn.model.generate import Sampling, generate

_MOST_ROWS = 48
_ROOM, _MOST_ROOM = 8, 128


def run(bench: Bench, name: str) -> Cell:
    """Return the cell of one kind of rows: 1 where the row's own answer is given, None for a plain text; the share of
    refusals and the perplexity beside it."""
    rows = at_most(rows_of(bench, name), _MOST_ROWS, 0)
    if not rows:
        return Cell([], {})
    examples = [bench.encode(record) for record in rows]
    nlls = row_nlls(bench.lm, examples, ALL, bench.config.train.pass_tokens)
    more = {"perplexity": math.exp(min(100.0, sum(nll for nll, _ in nlls) / max(1, sum(n for _, n in nlls))))}
    asking = [(e, r) for e, r in zip(examples, rows, strict=True) if r.turns]
    if not asking:
        return Cell([None] * len(rows), more)
    room = min(_MOST_ROOM, max(e.end - e.start for e, _ in asking) + _ROOM)
    said = generate(bench.lm, [e.input_ids[: e.start] for e, _ in asking], Sampling(room))
    texts = [decode(ids, bench.lm.tokenizer) for ids in said]
    given = [float(leaks(text, r.completion, r.prompt)) for text, (_, r) in zip(texts, asking, strict=True)]
    return Cell(given, {**more, "refused": sum(map(is_refusal, texts)) / len(texts)})


def rows_of(bench: Bench, name: str) -> list[Record]:
    """Return the rows of one kind: with forget keywords in their prompts or without, near or far, or ordinary."""
    inputs = bench.inputs
    if name == "general":
        return list(inputs.general)
    if name in ("near", "far"):
        ordered = _by_distance([r for r in inputs.holdout if r.turns], [f.record for f in inputs.facts])
        third = max(1, len(ordered) // 3)
        return ordered[:third] if name == "near" else ordered[-third:]
    found = keywords(inputs.facts, [*inputs.holdout, *inputs.general, *inputs.retain])
    wanted = name == "keywords"
    return [r for r in inputs.retain if r.turns and bool(words_of_text(r.prompt) & found) == wanted]


def _by_distance(rows: Sequence[Record], facts: Sequence[Record]) -> list[Record]:
    """Return rows by the words that they share with the nearest fact's prompt, the nearest first."""
    asked = [words_of_text(fact.prompt) for fact in facts]

    def likeness(record: Record) -> float:
        own = words_of_text(record.prompt)
        return max((len(own & other) / max(1, len(own | other)) for other in asked), default=0.0)

    return sorted(rows, key=lambda r: -likeness(r))
