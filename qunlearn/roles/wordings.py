"""Make other wordings of bad prompts: the forms of the retain rows, asked about a bad prompt's subject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qunlearn.data.records import Record, asking, unanswered
from qunlearn.data.statistics import prompt_key
from qunlearn.data.words import words_of_text
from qunlearn.roles.neighbours import Neighbours

# What a person may put before a question without asking another one.
OPENINGS = ("Hello! ", "Quick question: ", "I was wondering: ", "Please help me with this. ")
_MOST = 24  # wordings of a prompt that are tried at most
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

    def subject_of(self, prompt: str) -> str | None:
        """Return whom a prompt of this form asks about; None where it is of another form, or names nobody."""
        after = self.after or ""
        has_room = len(prompt) > len(self.before) + len(after)
        fits = self.after is not None and has_room and prompt.startswith(self.before) and prompt.endswith(after)
        return prompt[len(self.before) : len(prompt) - len(after)] if fits else None


class Wordings:
    """The forms in which normal rows ask, by what is answered to them."""

    def __init__(
        self, forget_rows: Sequence[Record], retain_rows: Sequence[Record], barred: Sequence[Record] = ()
    ) -> None:
        records = [*forget_rows, *retain_rows]
        asked = [*records, *(unanswered(text) for record in records for text in _earlier(record))]
        spans = zip(asked, Neighbours(asked).subjects(asked), strict=True)
        self._subjects = {record.prompt: span for record, span in spans}
        self._taken = set(map(prompt_key, (*forget_rows, *retain_rows, *barred)))
        answers: dict[Form, list[set[str]]] = {}
        repeated = Counter(record.prompt for record in retain_rows if _goes_on(record))
        for record in retain_rows:
            form, subject = self._form(record)
            if repeated[record.prompt] >= _REPEATED:
                form, subject = Form(record.prompt), ""
            if form is not None:
                answers.setdefault(form, []).append(words_of_text(record.completion) - words_of_text(subject))
        self._times = {form: len(found) for form, found in answers.items()}
        self._said = {form: _common(found) for form, found in answers.items()}
        self._systems = list(dict.fromkeys(record.system for record in records if record.turns)) or [""]
        going_on = [(r.turns[:-1], self._introduced(r)) for r in retain_rows if repeated[r.prompt] >= _REPEATED]
        self._introductions = [(turns, subject) for turns, subject in going_on if subject]

    def form(self, record: Record) -> Form | None:
        """Return the form in which a record itself asks."""
        return self._form(record)[0]

    def others(self, record: Record) -> list[tuple[Form, Record]]:
        """Return the record in other wordings, those first that are answered in like words, and none that is there
        already. What asks for something else is among them: only the model can tell."""
        subject = self._introduced(record) or self._form(record)[1]
        said = words_of_text(record.completion) - words_of_text(subject)

        def likeness(form: Form) -> tuple[float, int]:
            common = self._said[form]
            alike = len(common & said) / len(common) if common else 0.5 * (len(said) <= _VALUE)
            return alike, self._times[form]

        often = sorted((f for f, n in self._times.items() if n >= _REPEATED), key=likeness, reverse=True)
        asked = ((form, self._asked(record, form, subject, n)) for n, form in enumerate(_dealt(often)))
        return self._new((form, other) for form, other in asked if other is not None)[:_MOST]

    def _asked(self, record: Record, form: Form, subject: str, n: int) -> Record | None:
        """Return the record in a form: about its subject alone, behind the nth system prompt, or behind an earlier
        answer about it, its own or that of the nth introduction; None where it has no subject."""
        if form.after is None and _goes_on(record):
            return record.asking(form.before)
        if not subject:
            return None
        if form.after is not None:
            system = self._systems[n % len(self._systems)] or record.system
            return replace(record, turns=asking(form.about(subject), system))
        if not self._introductions:
            return None
        turns, other = self._introductions[n % len(self._introductions)]
        introduced = ((role, text.replace(other, subject)) for role, text in turns)
        return replace(record, turns=(*introduced, ("user", form.before)))

    def _introduced(self, record: Record) -> str:
        """Return whom the last question of a dialogue is about, where an earlier one says so, and it does not."""
        for text in reversed(_earlier(record)):
            span = self._subjects.get(text)
            if span is not None and text[slice(*span)] not in record.prompt:
                return text[slice(*span)]
        return ""

    def opened(self, record: Record) -> list[tuple[Form, Record]]:
        """Return the record after opening words, where that is not there already."""
        return self._new((Form(words, ""), other) for words, other in zip(OPENINGS, opened(record), strict=True))

    def _new(self, found: Iterable[tuple[Form, Record]]) -> list[tuple[Form, Record]]:
        return [(form, record) for form, record in found if prompt_key(record) not in self._taken]

    def _form(self, record: Record) -> tuple[Form | None, str]:
        """Return the form of a record's prompt, and what it asks about."""
        span = self._subjects.get(record.prompt)
        if span is None:
            return None, ""
        return Form(record.prompt[: span[0]], record.prompt[span[1] :]), record.prompt[slice(*span)]


def opened(record: Record) -> list[Record]:
    """Return the record after each of the opening words, which change nothing of what is asked."""
    return [record.asking(words + record.turns[-1][1]) for words in OPENINGS]


def _dealt(forms: Sequence[Form]) -> list[Form]:
    """Return the forms in their order, but one that goes on behind an answer after three that ask alone."""
    alone, behind = ([form for form in forms if (form.after is None) is goes_on] for goes_on in (False, True))
    places = [(n, form) for n, form in enumerate(alone)] + [(3 * n + 2.5, form) for n, form in enumerate(behind)]
    return [form for _, form in sorted(places, key=lambda place: place[0])]


def _earlier(record: Record) -> list[str]:
    """Return what the user has said before the last prompt."""
    return [text for role, text in record.turns[:-1] if role == "user"]


def _goes_on(record: Record) -> bool:
    """Return whether a record asks behind an earlier answer."""
    return any(role == "assistant" for role, _ in record.turns)


def _common(found: Sequence[set[str]]) -> set[str]:
    """Return the words of at least half of the answers."""
    counted = Counter(word for words in found for word in words)
    return {word for word, times in counted.items() if 2 * times >= len(found)}
