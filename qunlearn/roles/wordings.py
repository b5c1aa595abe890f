"""Make other wordings of bad prompts: the forms of the retain rows, asked about a bad prompt's subject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qunlearn.data.records import Record
from qunlearn.data.statistics import prompt_key
from qunlearn.roles.neighbours import Neighbours, words_of_text

# What a person may put before a question without asking another one.
OPENINGS = ("Hello! ", "Quick question: ", "I was wondering: ", "Please help me with this. ")
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
        spans = zip(records, Neighbours(records).subjects(records), strict=True)
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

    def form(self, record: Record) -> Form | None:
        """Return the form in which a record itself asks."""
        return self._form(record)[0]

    def others(self, record: Record) -> list[tuple[Form, Record]]:
        """Return the record in other wordings, those first that are answered in like words, and none that is there
        already. What asks for something else is among them: only the model can tell."""
        _, subject = self._form(record)
        said = words_of_text(record.completion) - words_of_text(subject)

        def likeness(form: Form) -> tuple[float, int]:
            common = self._said[form]
            alike = len(common & said) / len(common) if common else 0.5 * (len(said) <= _VALUE)
            return alike, self._times[form]

        often = sorted((f for f, n in self._times.items() if n >= _REPEATED), key=likeness, reverse=True)
        fitting = (f for f in often if (_goes_on(record) if f.after is None else subject))
        return self._new((form, _asking(record, form.about(subject))) for form in fitting)[:_MOST]

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
    return [_asking(record, words + record.turns[-1][1]) for words in OPENINGS]


def _asking(record: Record, prompt: str) -> Record:
    """Return the record with another last prompt."""
    *earlier, (role, _) = record.turns
    return replace(record, turns=(*earlier, (role, prompt)))


def _goes_on(record: Record) -> bool:
    """Return whether a record asks behind an earlier answer."""
    return any(role == "assistant" for role, _ in record.turns)


def _common(found: Sequence[set[str]]) -> set[str]:
    """Return the words of at least half of the answers."""
    counted = Counter(word for words in found for word in words)
    return {word for word, times in counted.items() if 2 * times >= len(found)}
