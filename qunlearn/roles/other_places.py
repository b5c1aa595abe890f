"""Ask for passages from other places than where their rows begin, to measure whether they are still recited there.

Only places from which the base recites the text tell anything, so it is asked first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.data.control_tokens import control_ids
from qunlearn.data.tokenize import Example, Template
from qunlearn.evaluation.metrics import LEAKS
from qunlearn.evaluation.scores import score_rows
from qunlearn.model.policy import Policy
from qunlearn.roles.later_starts import beginnings, is_recited
from qunlearn.roles.split import sampled
from qunlearn.utils.console import say, stage

_TOLD, _ASKED = 40, 40  # tokens of a text that are given, and that should come back
_TRIED, _MOST = 256, 128  # places that the base is asked from, and that are measured


@dataclass(frozen=True)
class Places:
    """Rows that begin where none of the file's does; for each the place of its bad row, and if it is trained on."""

    rows: Sequence[Example] = ()
    of: Sequence[int] = ()
    trained: Sequence[bool] = ()

    def untrained(self, kept: Sequence[int]) -> Places:
        """Return those that are not trained on and whose bad rows are kept, with the places that these have then."""
        place_of = {row: place for place, row in enumerate(kept)}
        rows = zip(self.rows, self.of, self.trained, strict=True)
        found = [(row, place_of[i]) for row, i, is_trained in rows if i in place_of and not is_trained]
        return Places([row for row, _ in found], [place for _, place in found], [False] * len(found))


def other_places(
    policy: Policy,
    forget_rows: Sequence[Example],
    trained: Sequence[Example],
    template: Template,
    limit: int,
    length: int,
    seed: int,
) -> Places:
    """Return rows that ask for the passages from where no row of the file begins, and the base recites them.

    `trained` are the rows that begin further on and are trained; `limit` are the most tokens of a pass, `length` those
    of a row.
    """
    passages = sampled([i for i, example in enumerate(forget_rows) if is_recited(example)], _TRIED, seed)
    known = {_asked(row) for row in trained}
    every = [(row, i) for i in passages for row in _places(forget_rows[i], policy.tokenizer, template, length)]
    tried = sampled(every, _TRIED, seed)
    if not tried:
        return Places()
    with stage("asking the base for passages from other places"), policy.reference():
        scores = score_rows(policy, [row for row, _ in tried], limit)
    recited = [pair for pair, score in zip(tried, scores, strict=True) if score.verdict == LEAKS]
    say(f"asked from {len(tried)} other places, the base recites the text from {len(recited)}: they are measured")
    kept = sampled(recited, _MOST, seed)
    return Places([row for row, _ in kept], [i for _, i in kept], [_asked(row) in known for row, _ in kept])


def _asked(row: Example) -> tuple[str, str]:
    return row.record.prompt, row.record.completion


def _places(example: Example, tokenizer: Any, template: Template, length: int) -> Iterator[Example]:
    starts, middle = beginnings(example, tokenizer, template, length)
    if example.record.turns:
        yield from (*starts, *middle)
    else:
        yield from map(_shortened, (*starts, *middle))
        yield from _within(example, tokenizer)


def _shortened(row: Example) -> Example:
    """Return a row of a text with no more of it than is asked for."""
    at = min(row.probe, row.start + _TOLD)
    end = min(row.end, at + _ASKED)
    return replace(row, input_ids=row.input_ids[:end], start=at, end=end, probe=at)


def _within(example: Example, tokenizer: Any) -> Iterator[Example]:
    """Yield the parts of a window in their order, each behind what is before it there."""
    ids, end = example.input_ids, example.end
    first = int(ids[0] in control_ids(tokenizer))
    for at in range(max(example.start, first + _TOLD), end - _ASKED + 1, _ASKED):
        part = (*ids[:first], *ids[at - _TOLD : at + _ASKED])
        start = first + _TOLD
        yield Example(part, start, len(part), start, replace(example.record, completion=tokenizer.decode(part[first:])))
