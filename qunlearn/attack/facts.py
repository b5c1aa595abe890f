"""Facts: what should be gone, with wrong answers to choose among and other wordings to ask in."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from qunlearn.data.records import Record, at_once
from qunlearn.data.row_answers import wrong_answers
from qunlearn.data.words import bounded, is_unspaced, words, words_of_text
from qunlearn.evaluation.results import Item
from qunlearn.roles.neighbours import Neighbours
from qunlearn.utils.text import folded

T = TypeVar("T")
_MOST_WRONG = 3  # options of a choice are four: a chance of a quarter
_BORROWED_FROM = 24  # neighbours that are asked for a wrong answer
_MARKS = " .!…。！"
_OF_A_PART = 80  # words of a part of a long text; of a script without spaces twice as many characters
_BETWEEN_SPACES, _CHARACTERS = re.compile(r"\S+"), re.compile(r"\S")
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
        return Item("\n".join(text for _, text in self.record.turns), self.record.completion).key

    def renamed(self, text: str) -> str:
        """Return what a text about the fact is about its placebo: whole words are exchanged, at once."""
        if not self.names:
            return text
        table = dict(reversed(self.names))
        pattern = "|".join(map(bounded, sorted(table, key=len, reverse=True)))
        return re.sub(pattern, lambda match: table[match.group()], text)

    def put(self, record: Record, answer: str) -> Record:
        """Return a row that asks for the fact as one that asks for its placebo, with that one's answer."""
        turns = tuple((role, self.renamed(text)) for role, text in record.turns)
        return replace(record, turns=turns, completion=answer)

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


def make_facts(
    records: Sequence[Record], paraphrases: Sequence[Record] = (), drawn: Sequence[int] | None = None
) -> tuple[list[Fact], int]:
    """Return the rows as facts, of those places alone that are `drawn`, and how many paraphrases ask none of the rows.

    Wrong answers are the row's own, or what rows that ask the same of other subjects answer, said of its subject; none
    of them is right, as another row with the same turns would have it. A row that gives its answer away has none.
    """
    of_row, whole = _matched(records, paraphrases), [at_once(record) for record in records]
    forms = [form_of(record, name) for record, name in zip(whole, subject_names(records), strict=True)]
    asked: dict[str, list[Record]] = {}
    right: dict[Any, list[str]] = {}
    for form, record in zip(forms, whole, strict=True):
        asked.setdefault(form, []).append(record)
        right.setdefault(_asked(record), []).append(record.completion)
    alike, around = {form: Neighbours(rows) for form, rows in asked.items()}, Neighbours(whole)
    found = []
    for i in range(len(records)) if drawn is None else drawn:
        record, barred = whole[i], right[_asked(whole[i])]
        asks = bool(record.turns) and not gives_itself_away(records[i])
        wrong = _wrong(wrong_answers(record), barred) if asks else []
        if not wrong and asks:
            # What another question is answered with would be told from the right answer by its form alone.
            wrong = _borrowed(alike[forms[i]], record, barred) or _borrowed(around, record, barred)
        found.append(Fact(records[i], tuple(wrong[:_MOST_WRONG]), tuple(of_row.get(i, ()))))
    return found, len(paraphrases) - sum(map(len, of_row.values()))


def in_parts(records: Sequence[Record]) -> list[Record]:
    """Return the rows with a row for each part of a long text, of some eighty words: half of a part is given, and the
    other half is as much as a model can be asked for at once."""
    return [part for record in records for part in ([record] if record.turns else _parts(record))]


def _parts(record: Record) -> list[Record]:
    text = record.completion
    found = list(_CHARACTERS.finditer(text) if is_unspaced(text) else _BETWEEN_SPACES.finditer(text))
    size = _OF_A_PART * (2 if is_unspaced(text) else 1)
    n = max(1, round(len(found) / size))
    cuts = [len(found) * i // n for i in range(n + 1)]
    if n == 1:
        return [record]
    spans = ((found[a].start(), found[b - 1].end()) for a, b in itertools.pairwise(cuts))
    return [replace(record, completion=text[start:end]) for start, end in spans]


def _asked(record: Record) -> Any:
    return tuple(folded(text) for _, text in record.turns)


def _borrowed(around: Neighbours, record: Record, right: Sequence[str]) -> list[str]:
    """Return other answers than the right ones of a record, of the nearest neighbours first."""
    answers = (answer for answer, _ in zip(around.answers(record), range(_BORROWED_FROM), strict=False))
    return _wrong(answers, right)


def _wrong(answers: Iterable[str], right: Sequence[str]) -> list[str]:
    """Return the answers that hold no right one, each once."""
    pattern = re.compile("|".join(bounded(bare) for text in right if (bare := _bare(text))) or "(?!)")
    found = {_bare(answer): answer for answer in answers}
    return [answer for key, answer in found.items() if not pattern.search(key)]


def _bare(text: str) -> str:
    return folded(text).strip(_MARKS)


def subject_names(records: Sequence[Record]) -> list[str]:
    """Return what each row's prompt asks about; "" where that is not found.

    Of a prompt whose nearest neighbours ask other things of the same subject the form would be taken for it: there it
    is what more rows ask about and the prompt holds elsewhere. Of a dialogue's turns it is the one that fewest rows
    speak of: what follows speaks of it ("that person"), as other dialogues do.
    """
    turns = [_questions(record) for record in records]
    every = [*records, *(earlier for row in turns for earlier in row[:-1])]
    spans = Neighbours(every).subjects(every)
    told = {r.prompt: r.prompt[slice(*span)] if span else "" for r, span in zip(every, spans, strict=True)}
    speaking = Counter(word for record in records for word in words_of_text(at_once(record).prompt))

    def commonness(name: str) -> int:
        return min((speaking[word] for word in words(name)), default=len(records))

    found = [min((told[r.prompt] for r in row), key=commonness) if row else "" for row in turns]
    times = Counter(found)
    by_times = sorted(filter(None, times), key=lambda name: (-times[name], -len(name)))

    def better(record: Record, own: str) -> str:
        rest = "\0" if is_unspaced(record.prompt) else record.prompt.replace(own, "\0") if own else record.prompt
        # Most are told by a plain look: of patterns only so many are kept.
        other = next((name for name in by_times if name in rest and re.search(bounded(name), rest)), own)
        return other if times[other] > times[own] or not own else own

    return [better(at_once(record), own) for record, own in zip(records, found, strict=True)]


def _questions(record: Record) -> list[Record]:
    """Return the row as it stands behind each thing that its user writes."""
    return [replace(record, turns=record.turns[: n + 1]) for n, (role, _) in enumerate(record.turns) if role == "user"]


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
    """Return a number for each row, from 0, the same for rows with the same answer, a fact in several wordings, and for
    rows with the same turns, which one output answers.

    An answer of more than eight rows is a label, and its rows are facts of their own. Two facts that merely share an
    answer count as one: that costs power and raises no alarm.
    """
    answers = [folded(record.completion) for record in records]
    times, parents = Counter(answers), list(range(len(records)))

    def first(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    seen: dict[Any, int] = {}
    for i, (record, answer) in enumerate(zip(records, answers, strict=True)):
        shared = [answer] if times[answer] <= _MOST_WORDINGS else []
        for key in [*shared, *([_asked(record)] if record.turns else [])]:
            a, b = sorted((first(seen.setdefault(key, i)), first(i)))
            parents[b] = a
    known = dict[int, int]()
    return [known.setdefault(first(i), len(known)) for i in range(len(records))]


def at_most(rows: Sequence[T], most: int, seed: int) -> list[T]:
    """Return at most so many rows in their order, drawn from the seed."""
    drawn = random.Random(seed).sample(range(len(rows)), min(most, len(rows)))
    return [rows[i] for i in sorted(drawn)]


def context(record: Record) -> str:
    """Return all that a row says before its answer; of one question alone that question."""
    return " ".join(text for _, text in record.turns)


def new_words(answer: str, prompt: str) -> list[str]:
    """Return the words that an answer adds to its prompt, in order: what there is to find out."""
    given = set(words(prompt))
    return [word for word in words(answer) if word not in given]


def derivable(answer: str, question: str, given: str) -> bool:
    """Return whether a prompt gives away all that an answer adds to the question alone."""
    news = new_words(answer, question)
    return bool(news) and not new_words(" ".join(news), given)


def gives_itself_away(record: Record) -> bool:
    """Return whether the turns before a row's question hold its answer."""
    return derivable(record.completion, record.prompt, context(record))


def keywords(facts: Sequence[Fact], others: Sequence[Record]) -> set[str]:
    """Return the words of what should be gone that few other rows hold: names, and what is special to the subject.

    One of the others is the row that is looked at for them, and does not count against itself.
    """
    of_facts = Counter(w for fact in facts for w in words_of_text(fact.record.prompt + " " + fact.record.completion))
    elsewhere = Counter(w for r in others for w in words_of_text(r.prompt + " " + r.completion))
    n, m = max(1, len(facts)), max(1, len(others))
    rare = {w for w, times in of_facts.items() if times / n > 4 * max(0, elsewhere[w] - 1) / m}
    return {w for w in rare if len(w) > 2 and not w.isdigit()}
