"""Tell what rows ask about: the words in which questions of one form differ."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

from qunlearn.data.records import Record, at_once, unanswered
from qunlearn.data.words import beginning, bounded, pieces
from qunlearn.guard.lexicon import Span, distinct_words
from qunlearn.roles.neighbours import Neighbours
from qunlearn.utils.text import folded

_FORM = 2  # words of a prompt beside its subject, at least, that make a form
_FEW, _RARE = 2, 0.02  # rows of the other kind that may speak of a subject, or share of them


def turns_of(record: Record) -> tuple[str, ...]:
    """Return what a row's user writes, turn by turn, or a plain text's beginning."""
    if record.turns:
        return tuple(text for role, text in record.turns if role == "user")
    return (beginning(record.completion, max(4, len(pieces(record.completion)) // 2)),)


def question_of(record: Record) -> str:
    """Return what a row asks: all its user writes, for a last question may say nothing of whom it is about."""
    return " ".join(turns_of(record))


class Subjects:
    """What bad prompts are about, told from their neighbours: the words in which prompts of one form differ. own: the
    bad rows' subjects, folded; theirs: what rows to pass are about."""

    def __init__(self, bad: Sequence[Record], normal: Sequence[Record]) -> None:
        self.bad = [at_once(r) for r in bad]
        self.spans, theirs = _spans(bad, normal)
        self.own = {folded(text) for i in range(len(bad)) if (text := self.of(i))}
        self._names = re.compile("|".join(map(bounded, sorted(self.own))) or "(?!)")
        found = (question_of(r)[slice(*span)] for r, span in zip(normal, theirs, strict=True) if span is not None)
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
        return {b + subject + a for subject in found if folded(subject) not in self.own for b, a in forms}


def _spans(bad: Sequence[Record], normal: Sequence[Record]) -> tuple[list[Span | None], list[Span | None]]:
    """Return where in each bad and each normal question its subject stands; None where no neighbour tells it.

    Of a dialogue's turns it is the first one's that rows of the other kind hardly speak of: what follows speaks of it
    ("that place"), and both kinds ask the same ("who governs").
    """
    turns = [[turns_of(r) if r.turns else () for r in records] for records in (bad, normal)]
    texts = [unanswered(text) for text in dict.fromkeys(text for kind in turns for row in kind for text in row)]
    told = {r.prompt: span for r, span in zip(texts, Neighbours(texts).subjects(texts), strict=True)}
    held = [Counter(word for row in kind for word in distinct_words(row)) for kind in turns]

    def chosen(row: Sequence[str], elsewhere: Counter[str], rare: float) -> Span | None:
        starts = itertools.accumulate((len(text) + 1 for text in row[:-1]), initial=0)
        found = [(at, text, span) for at, text in zip(starts, row, strict=False) if (span := told[text])]
        if not found:
            return None
        names = [distinct_words([text[slice(*span)]]) for _, text, span in found]
        commonness = [max(rare, min((elsewhere[word] for word in words), default=0)) for words in names]
        at, _, (first, last) = found[commonness.index(min(commonness))]
        return at + first, at + last

    others = zip(turns, held[::-1], (normal, bad), strict=True)
    of_bad, of_normal = (
        [chosen(row, words, max(_FEW, _RARE * len(rows))) for row in kind] for kind, words, rows in others
    )
    return of_bad, of_normal
