"""Other wordings of bad prompts: how the normal data asks about others, asked about what a bad prompt is about."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qunlearn.data.borrowed import Neighbours
from qunlearn.data.records import Record

# What a person may put before a question without asking another one.
OPENINGS = ("Hello! ", "Quick question: ", "I was wondering: ", "Please help me with this. ")
_WORD = re.compile(r"\w+")
_MOST = 12  # wordings of a prompt that are tried at most
_REPEATED = 3  # times a form, or a last question of dialogues, is there: fewer may be a slip of the model
_VALUE = 3  # words of an answer that may be a value alone


@dataclass(frozen=True)
class Form:
    """A prompt with what it is about left open; without `after` it asks about what was said before it."""

    before: str
    after: str | None = None

    def about(self, subject: str) -> str:
        """Return the prompt about a subject."""
        return self.before if self.after is None else self.before + subject + self.after


class Wordings:
    """The forms in which normal rows ask, by what is answered to them."""

    def __init__(self, bad: Sequence[Record], normal: Sequence[Record], barred: Sequence[Record] = ()) -> None:
        self._around = Neighbours([*bad, *normal])
        self._taken = {record.prompt for record in (*bad, *normal, *barred)}
        answers: dict[Form, list[set[str]]] = {}
        repeated = Counter(record.prompt for record in normal if _goes_on(record))
        for record in normal:
            form, subject = self._form(record)
            if repeated[record.prompt] >= _REPEATED:
                form, subject = Form(record.prompt), ""
            if form is not None:
                answers.setdefault(form, []).append(_words(record.completion) - _words(subject))
        self._times = {form: len(found) for form, found in answers.items()}
        self._said = {form: _common(found) for form, found in answers.items()}

    def form(self, record: Record) -> Form | None:
        """Return the form in which a record itself asks."""
        return self._form(record)[0]

    def others(self, record: Record) -> list[tuple[Form, Record]]:
        """Return the record asked otherwise, in the forms first that are answered in like words. What is answered
        otherwise is among them: only the model can tell."""
        _, subject = self._form(record)
        said = _words(record.completion) - _words(subject)

        def likeness(form: Form) -> tuple[float, int]:
            common = self._said[form]
            alike = len(common & said) / len(common) if common else 0.5 * (len(said) <= _VALUE)
            return alike, self._times[form]

        often = [f for f, n in self._times.items() if n >= _REPEATED and f.about(subject) != record.prompt]
        fitting = [f for f in often if (f.after is not None and subject) or (f.after is None and _goes_on(record))]
        found = [
            (form, replace(record, turns=(*record.turns[:-1], (record.turns[-1][0], form.about(subject)))))
            for form in sorted(fitting, key=likeness, reverse=True)[: 2 * _MOST]
        ]
        return [(form, other) for form, other in found if form.after is None or other.prompt not in self._taken][:_MOST]

    def _form(self, record: Record) -> tuple[Form | None, str]:
        """Return the form of a record's prompt, and what it asks about."""
        span = self._around.subject(record) if record.prompt else None
        if span is None:
            return None, ""
        return Form(record.prompt[: span[0]], record.prompt[span[1] :]), record.prompt[slice(*span)]


def opened(record: Record) -> list[tuple[Form, Record]]:
    """Return the record asked after a few opening words, which change nothing of what is asked."""
    *earlier, (role, content) = record.turns
    return [(Form(words, ""), replace(record, turns=(*earlier, (role, words + content)))) for words in OPENINGS]


def _goes_on(record: Record) -> bool:
    """Whether a record asks behind an earlier answer."""
    return any(role == "assistant" for role, _ in record.turns)


def _words(text: str) -> set[str]:
    return set(map(str.casefold, _WORD.findall(text)))


def _common(found: Sequence[set[str]]) -> set[str]:
    """Return the words of at least half of the answers."""
    counted = Counter(word for words in found for word in words)
    return {word for word, times in counted.items() if 2 * times >= len(found)}
