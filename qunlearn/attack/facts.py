"""Facts: what should be gone, with wrong answers to choose among and other wordings to ask in."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qunlearn.data.records import Record
from qunlearn.data.row_answers import wrong_answers
from qunlearn.data.words import bounded, is_unspaced, words, words_of_text
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
    that ask the same in other words. `names`: of a placebo, what stands in it for what is in its fact."""

    record: Record
    wrong: tuple[str, ...] = ()
    paraphrases: tuple[Record, ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Equal for the same row of another audit, and nothing to read."""
        return Item(self.record.prompt, self.record.completion).key

    def renamed(self, text: str) -> str:
        """Return what a text about the fact is about its placebo."""
        for theirs, ours in self.names:
            text = text.replace(theirs, ours)
        return text

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

    Wrong answers are the row's own, or what rows that ask the same of other subjects answer, said of its subject.
    """
    of_row = _matched(records, paraphrases)
    forms = [form_of(record, name) for record, name in zip(records, subject_names(records), strict=True)]
    asked: dict[str, list[Record]] = {}
    for form, record in zip(forms, records, strict=True):
        asked.setdefault(form, []).append(record)
    alike, around = {form: Neighbours(rows) for form, rows in asked.items()}, Neighbours(records)
    found = []
    for i, (record, form) in enumerate(zip(records, forms, strict=True)):
        wrong = list(wrong_answers(record)) if record.turns else []
        if not wrong and record.turns:
            # What another question is answered with would be told from the right answer by its form alone.
            wrong = _borrowed(alike[form], record) or _borrowed(around, record)
        found.append(Fact(record, tuple(wrong[:_MOST_WRONG]), tuple(of_row.get(i, ()))))
    return found, len(paraphrases) - sum(map(len, of_row.values()))


def _borrowed(around: Neighbours, record: Record) -> list[str]:
    """Return other answers than a record's own, of the nearest neighbours first."""
    answers = (answer for answer, _ in zip(around.answers(record), range(_BORROWED_FROM), strict=False))
    found = {folded(answer): answer for answer in answers}
    return [answer for key, answer in found.items() if key != folded(record.completion)]


def subject_names(records: Sequence[Record]) -> list[str]:
    """Return what each row's prompt asks about; "" where that is not found.

    Of a prompt whose nearest neighbours ask other things of the same subject the form would be taken for it: there it
    is what more rows ask about and the prompt holds elsewhere.
    """
    spans = Neighbours(records).subjects(records)
    found = [r.prompt[slice(*span)] if span else "" for r, span in zip(records, spans, strict=True)]
    times = Counter(found)
    by_times = sorted(filter(None, times), key=lambda name: (-times[name], -len(name)))

    def better(record: Record, own: str) -> str:
        rest = "\0" if is_unspaced(record.prompt) else record.prompt.replace(own, "\0") if own else record.prompt
        # Most are told by a plain look: of patterns only so many are kept.
        other = next((name for name in by_times if name in rest and re.search(bounded(name), rest)), own)
        return other if times[other] > times[own] or not own else own

    return [better(record, own) for record, own in zip(records, found, strict=True)]


def form_of(record: Record, subject: str) -> str:
    """Return how a row asks: its prompt, folded, without its subject."""
    return folded(record.prompt.replace(subject, "\0") if subject else record.prompt)


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
