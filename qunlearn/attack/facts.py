"""Facts: what should be gone, with wrong answers to choose among and other wordings to ask in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qunlearn.data.records import Record
from qunlearn.data.row_answers import wrong_answers
from qunlearn.data.words import words_of_text
from qunlearn.evaluation.metrics.texts import words
from qunlearn.evaluation.results import Item
from qunlearn.roles.neighbours import Neighbours
from qunlearn.utils.text import folded

T = TypeVar("T")
_MOST_WRONG = 3  # options of a choice are four: a chance of a quarter
_BORROWED_FROM = 24  # neighbours that are asked for a wrong answer
_MOST_WORDINGS = 8  # rows of one answer that are wordings of one fact; more of them share a label


@dataclass(frozen=True)
class Fact:
    """A row to forget. `wrong` are answers of the same kind that are not its own; `paraphrases` are rows of the user's
    that ask the same in other words."""

    record: Record
    wrong: tuple[str, ...] = ()
    paraphrases: tuple[Record, ...] = ()

    @property
    def key(self) -> str:
        """Equal for the same row of another audit, and nothing to read."""
        return Item(self.record.prompt, self.record.completion).key

    @property
    def asks(self) -> bool:
        """Return whether it has a prompt: a plain text has none."""
        return bool(self.record.turns)


@dataclass(frozen=True)
class Inputs:
    """The rows of an audit by what they are for; what was not given is empty."""

    facts: Sequence[Fact]
    placebo: Sequence[Fact] = ()
    retain: Sequence[Record] = ()
    holdout: Sequence[Record] = ()
    general: Sequence[Record] = ()
    unmatched: int = 0  # paraphrases that belong to no row
    sources: Mapping[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> list[int]:
        """Return, per fact, a number that the wordings of one fact share: of them one piece of evidence is had."""
        return units_of([fact.record for fact in self.facts])


def make_facts(records: Sequence[Record], paraphrases: Sequence[Record] = ()) -> tuple[list[Fact], int]:
    """Return the rows as facts, and how many paraphrases ask none of them.

    Wrong answers are the row's own, or those of its neighbours about its subject.
    """
    around, of_row = Neighbours(records), _matched(records, paraphrases)
    found = []
    for i, record in enumerate(records):
        wrong = list(wrong_answers(record)) if record.turns else []
        if not wrong and record.turns:
            own = {folded(record.completion)}
            for answer, _ in zip(around.answers(record), range(_BORROWED_FROM), strict=False):
                if folded(answer) not in own:
                    own.add(folded(answer))
                    wrong.append(answer)
        found.append(Fact(record, tuple(wrong[:_MOST_WRONG]), tuple(of_row.get(i, ()))))
    return found, len(paraphrases) - sum(map(len, of_row.values()))


def _matched(records: Sequence[Record], paraphrases: Sequence[Record]) -> dict[int, list[Record]]:
    """Return the paraphrases of each row: those with its answer, of several such rows the one asked in like words."""
    rows: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        if record.turns:
            rows.setdefault(folded(record.completion), []).append(i)
    said = [words_of_text(record.prompt) for record in records]
    found: dict[int, list[Record]] = {}
    for record in paraphrases:
        asked = words_of_text(record.prompt)
        places = rows.get(folded(record.completion), [])
        if places and record.turns:
            found.setdefault(max(places, key=lambda i: len(said[i] & asked)), []).append(record)
    return found


def units_of(records: Sequence[Record]) -> list[int]:
    """Return a number for each row, from 0, the same for rows with the same answer: a fact in several wordings.

    An answer of more than eight rows is a label, and its rows are facts of their own. Two facts that merely share an
    answer count as one: that costs power and raises no alarm.
    """
    answers = [folded(record.completion) for record in records]
    times, known = Counter(answers), dict[Any, int]()
    keys = [answer if times[answer] <= _MOST_WORDINGS else i for i, answer in enumerate(answers)]
    return [known.setdefault(key, len(known)) for key in keys]


def at_most(rows: Sequence[T], most: int, seed: int) -> list[T]:
    """Return at most so many rows in their order, drawn from the seed."""
    drawn = random.Random(seed).sample(range(len(rows)), min(most, len(rows)))
    return [rows[i] for i in sorted(drawn)]


def new_words(answer: str, prompt: str) -> list[str]:
    """Return the words that an answer adds to its prompt, in order: what there is to find out."""
    given = set(words(prompt))
    return [word for word in words(answer) if word not in given]


def keywords(facts: Sequence[Fact], others: Sequence[Record]) -> set[str]:
    """Return the words of what should be gone that few other rows hold: names, and what is special to the subject."""
    of_facts = Counter(w for fact in facts for w in words_of_text(fact.record.prompt + " " + fact.record.completion))
    elsewhere = Counter(w for r in others for w in words_of_text(r.prompt + " " + r.completion))
    n, m = max(1, len(facts)), max(1, len(others))
    return {w for w, times in of_facts.items() if len(w) > 2 and times / n > 4 * elsewhere[w] / m and not w.isdigit()}
