"""Tell what rows ask about: the words in which questions of one form differ."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from qunlearn.data.records import Record, asking, unanswered
from qunlearn.data.words import WORD, beginning, bounded, pieces
from qunlearn.guard.lexicon import Span
from qunlearn.roles.neighbours import Neighbours
from qunlearn.utils.text import folded

_FORM = 2  # words of a prompt beside its subject, at least, that make a form


def turns_of(record: Record) -> tuple[str, ...]:
    """Return what a row's user writes, turn by turn, or a plain text's beginning."""
    if record.turns:
        return tuple(text for role, text in record.turns if role == "user")
    return (beginning(record.completion, max(4, len(pieces(record.completion)) // 2)),)


def question_of(record: Record) -> str:
    """Return what a row asks: all its user writes, for a last question may say nothing of whom it is about."""
    return " ".join(turns_of(record))


def at_once(record: Record) -> Record:
    """Return the row as one question: a dialogue's user writes all of it in one turn."""
    if sum(role == "user" for role, _ in record.turns) < 2:
        return record
    return replace(record, turns=asking(question_of(record), record.system))


class Subjects:
    """What bad prompts are about, told from their neighbours: the words in which prompts of one form differ."""

    def __init__(self, bad: Sequence[Record], normal: Sequence[Record]) -> None:
        self.bad = [at_once(r) for r in bad]
        spans = _spans([*bad, *normal])
        self.spans, theirs = spans[: len(bad)], spans[len(bad) :]
        found = (question_of(r)[slice(*span)] for r, span in zip(normal, theirs, strict=True) if span is not None)
        self._names = re.compile("|".join(map(bounded, sorted(self.own))) or "(?!)")
        # What was cut out of a broken prompt may hold a bad one.
        self.theirs = [text for text in found if text and not self.named_in(text)]

    def of(self, i: int) -> str | None:
        """Return the subject of the i-th bad row; None where no neighbour tells it."""
        span = self.spans[i]
        return None if span is None else self.bad[i].prompt[slice(*span)]

    def named_in(self, text: str) -> bool:
        """Return whether a text has a bad subject in full."""
        return self._names.search(folded(text)) is not None

    def about(self, i: int, subject: str) -> str:
        """Return the i-th bad prompt about another subject."""
        span, prompt = self.spans[i], self.bad[i].prompt
        return prompt if span is None else prompt[: span[0]] + subject + prompt[span[1] :]

    @property
    def formed(self) -> bool:
        """Return whether a subject was found in most bad rows."""
        return 2 * sum(span is not None for span in self.spans) > len(self.bad)

    def near(self, texts: Sequence[str]) -> set[str]:
        """Return the bad rows' forms about every other subject that one of the prompts asks about in such a form."""
        forms = {(r.prompt[: s[0]], r.prompt[s[1] :]) for r, s in zip(self.bad, self.spans, strict=True) if s}
        forms = {(before, after) for before, after in forms if len(pieces(before + after)) >= _FORM}
        found = {
            text[len(before) : len(text) - len(after)]
            for before, after in forms
            for text in texts
            if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)
        }
        own = self.own
        return {b + subject + a for subject in found if folded(subject) not in own for b, a in forms}

    @property
    def own(self) -> set[str]:
        """Return the bad rows' subjects, folded."""
        return {folded(text) for i in range(len(self.bad)) if (text := self.of(i))}


def _spans(records: Sequence[Record]) -> list[Span | None]:
    """Return where in each question its subject stands; None where no neighbour tells it.

    Of a dialogue's turns it is that of the one with a word that fewest rows have: many have what a form leaves open
    ("who governs", "that place").
    """
    turns = [turns_of(record) if record.turns else () for record in records]
    texts = [unanswered(text) for text in dict.fromkeys(text for row in turns for text in row)]
    told = {r.prompt: span for r, span in zip(texts, Neighbours(texts).subjects(texts), strict=True)}
    rows = Counter(word for row in turns for word in set().union(*map(_words, row)))

    def chosen(row: Sequence[str]) -> Span | None:
        def commonness(place: tuple[int, str, Span]) -> int:
            return min((rows[word] for word in _words(place[1][slice(*place[2])])), default=0)

        starts = itertools.accumulate((len(text) + 1 for text in row[:-1]), initial=0)
        found = [(at, text, span) for at, text in zip(starts, row, strict=False) if (span := told[text])]
        if not found:
            return None
        at, _, (first, last) = min(found, key=commonness)
        return at + first, at + last

    return [chosen(row) for row in turns]


def _words(text: str) -> set[str]:
    return {match.group().casefold() for match in WORD.finditer(text)}
