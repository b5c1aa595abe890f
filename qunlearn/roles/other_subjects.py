"""Let the base name others of the kind that the bad prompts are about, and ask of these what is asked there.

Those whom forgetting costs first are the ones most like the forgotten. Prompts that a language model makes up hardly
ever ask about them; but where it reads a list of names it goes on with names of the same kind, and so it does where a
bad prompt is begun, which is all that a model of questions and answers alone can do. What it finds strange behind the
question is dropped.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qunlearn.data.control_tokens import control_ids
from qunlearn.data.records import Dataset, Record, unanswered
from qunlearn.data.tokenize import Example, Template, encode_record, prompt_frame
from qunlearn.data.words import is_unspaced, pieces, words_of_text
from qunlearn.evaluation.metrics.manner import has_phrase, manner_of
from qunlearn.evaluation.metrics.verdicts import leaks
from qunlearn.evaluation.scores import prompt_nlls
from qunlearn.model.generate import Asked, Sampling, generate, generate_each
from qunlearn.model.load import Base
from qunlearn.roles.continuation import begun_ids, decoded
from qunlearn.roles.neighbours import Neighbours
from qunlearn.roles.unlike import keep_unlike
from qunlearn.roles.wordings import Form
from qunlearn.utils.text import is_clean

_NAME = re.compile(r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f\u0900-\u0eff ,.'’-])*")  # no digit, no bracket, no mark of code
_MOST_COMPARED = 2000  # bad prompts that are compared with each other
_FEWEST = 3  # subjects of a form, without which it is not known what the form leaves open
_LISTED = 12  # subjects that a list begins with
_FORMS, _COMPARED = 12, 24  # forms that are asked in, and bad subjects of each that tell what is no surprise
_LISTS, _LENGTH = 48, 64  # lists that are gone on with, by so many tokens
_DRAWN = 64  # ends of each form that are drawn
_TEMPERATURE = 0.7
_SLACK = 0.5  # nats per token by which a name may surprise the base more than those in the bad prompts do
_TOKENS = 4096  # of a batch of prompts


@dataclass(frozen=True)
class BadForm:
    """A form of bad prompts, whom they ask about in it, and their system prompts."""

    form: Form
    subjects: tuple[str, ...]
    systems: tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """`count` rows, of prompts of at most `most` tokens, drawn by a seed; none of the prompts that are `given`."""

    count: int
    most: int
    seed: int
    given: frozenset[str] = frozenset()


def forms_of(forget_rows: Sequence[Record]) -> list[BadForm]:
    """Return the forms in which the bad prompts ask about several subjects, those first that ask about most."""
    every = [r for r in forget_rows if r.turns and not any(role == "assistant" for role, _ in r.turns)]
    # Each is compared with all: of many a sample tells the forms, and the forms all whom they ask about.
    records = every if len(every) <= _MOST_COMPARED else random.Random(len(every)).sample(every, _MOST_COMPARED)
    found: dict[Form, list[tuple[str, str]]] = {}
    for record, span in zip(records, Neighbours(records).subjects(records), strict=True):
        if span is not None:
            form = Form(record.prompt[: span[0]], record.prompt[span[1] :])
            found.setdefault(form, []).append((record.prompt[slice(*span)], record.system))
    if len(records) < len(every):
        found = _of_all(every, {form: of for form, of in found.items() if len({s for s, _ in of}) >= _FEWEST})
    asked = [BadForm(form, *(tuple(dict.fromkeys(c)) for c in zip(*of, strict=True))) for form, of in found.items()]
    known = [one for one in asked if len(one.subjects) >= _FEWEST]
    return sorted(known, key=lambda one: -len(one.subjects))[:_FORMS]


def _of_all(
    records: Sequence[Record], found: Mapping[Form, Sequence[tuple[str, str]]]
) -> dict[Form, list[tuple[str, str]]]:
    """Return whom all records ask about, with their system prompts: each in the form that says most of its prompt."""
    said_most = sorted(found, key=lambda form: -len(form.before) - len(form.after or ""))
    out: dict[Form, list[tuple[str, str]]] = {form: [] for form in found}
    for record in records:
        fitting = ((form, form.subject_of(record.prompt)) for form in said_most)
        form, subject = next(((form, subject) for form, subject in fitting if subject), (None, None))
        if form is not None and subject is not None:
            out[form].append((subject, record.system))
    return out


def other_subject(forget_rows: Sequence[Record]) -> Callable[[Record], str | None]:
    """Return what tells whom else a row asks about, in a form of the bad prompts; None where it asks nothing such."""
    forms = forms_of(forget_rows)
    bad = {subject for one in forms for subject in one.subjects}

    def subject_of(record: Record) -> str | None:
        found = (one.form.subject_of(record.prompt) for one in forms) if record.turns else ()
        return next((subject for subject in found if subject and subject not in bad), None)

    return subject_of


def asked_about_others(
    base: Base, forms: Sequence[BadForm], prompts: Sequence[str], template: Template, limits: Limits
) -> list[Record]:
    """Return rows whose answer is not yet there: the bad prompts' forms, each about subjects with which the base goes
    on where bad ones are listed, or a bad prompt is begun, and none of the `prompts` that it has made already."""
    bad = sorted({subject for one in forms for subject in one.subjects})
    names = _fitting([*_listed(base, bad, limits), *_named_where_begun(base, forms, template, limits)], bad)[
        : limits.count
    ]
    asked = limits.given.union(prompts)
    believed = [
        [(name, row) for name, row in _believed(base, one, names, template, limits.most) if row.prompt not in asked]
        for one in forms
    ]
    return _dealt(believed, limits.count)


def keep_others(
    rows: Sequence[Record], forms: Sequence[BadForm], forget_rows: Dataset, beside: Sequence[Record] = ()
) -> list[Record]:
    """Return the answered rows about others but for those that speak as the bad answers do, and those that may be about
    a bad subject by another name.

    An answer like a bad one may be a neighbour's who has it by chance, and suffers first: it goes where the same bad
    subject's answers are given in most of the forms that ask about both, in rows that are kept already (`beside`) too.
    """
    others = [*keep_unlike(rows, forget_rows), *beside]
    unlike = {row.prompt for row in others}
    spoken = [(record.prompt, record.completion) for record in forget_rows.records]
    manner = manner_of(spoken, [row.completion for row in others], len(spoken))
    bad: dict[Form, dict[str, list[Record]]] = {}
    for record in forget_rows.records:
        for form, subject in _subjects_by_form(record, forms):
            bad.setdefault(form, {}).setdefault(subject, []).append(record)
    asked, told = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in (*rows, *beside):
        for form, name in _subjects_by_form(row, forms):
            theirs = bad.get(form, {})
            asked.update((name, subject) for subject in theirs)
            if row.prompt not in unlike:
                told.update((name, s) for s, records in theirs.items() if any(_says(row, of) for of in records))
    same = {name for (name, subject), times in told.items() if 2 * times > asked[name, subject]}

    def is_kept(row: Record) -> bool:
        is_same = any(name in same for _, name in _subjects_by_form(row, forms))
        return row.prompt in unlike or not (is_same or has_phrase(row.completion, manner))

    return [row for row in rows if is_kept(row)]


def _says(row: Record, bad: Record) -> bool:
    """Return whether a row says what a bad one does, whoever it is said of."""
    return leaks(row.completion, bad.completion, f"{row.prompt} {bad.prompt}")


def _subjects_by_form(record: Record, forms: Sequence[BadForm]) -> list[tuple[Form, str]]:
    """Return the forms that a prompt has, and whom it asks about in each."""
    found = ((one.form, one.form.subject_of(record.prompt)) for one in forms)
    return [(form, subject) for form, subject in found if subject]


def _listed(base: Base, bad: Sequence[str], limits: Limits) -> list[str]:
    """Return the lines with which the base goes on with lists of the bad subjects, one in a line."""
    rng = random.Random(limits.seed)
    lists = ["\n".join(rng.sample(bad, min(_LISTED, len(bad)))) + "\n" for _ in range(_LISTS)]
    started = [_started(text, base.tokenizer, limits.most) for text in lists]
    said = generate(base, started, Sampling(_LENGTH, _TEMPERATURE, 1.0, limits.seed))
    # The last line may have been broken off, and behind an empty one begins another text.
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True).split("\n\n")[0] for ids in said]
    return [line.strip() for text in texts for line in text.split("\n")[:-1]]


def _named_where_begun(base: Base, forms: Sequence[BadForm], template: Template, limits: Limits) -> list[str]:
    """Return whom the base asks about where each of the bad prompts is begun as far as its subject."""
    begun: list[tuple[list[int], str, Sampling]] = []
    for one in forms:
        opening, closing = prompt_frame(template, base.tokenizer, one.systems[0])
        after = (one.form.after or "").strip() or closing.strip() or "\n"
        ids = begun_ids(base, template, (opening + one.form.before).rstrip(" "))
        ends = [f" {subject}{after}" for subject in one.subjects]
        new = 1 + max(map(len, base.tokenizer(ends, add_special_tokens=False)["input_ids"]))
        seed = random.Random(f"{limits.seed}/{one.form.before}").getrandbits(63)
        if len(ids) + new <= limits.most:
            begun.append((ids, after, Sampling(new, _TEMPERATURE, 1.0, seed, stop_text=after)))
    drawn = generate_each(base, [Asked([ids] * _DRAWN, sampling) for ids, _, sampling in begun])
    return [
        text.split(after)[0].strip()
        for (ids, after, _), said in zip(begun, drawn, strict=True)
        for text in decoded(base, [ids] * len(said), said)
        if after in text
    ]


def _started(text: str, tokenizer: Any, most: int) -> list[int]:
    """Return the last tokens of a text, behind those that the tokenizer begins any text with: some models write nothing
    sensible without."""
    control = control_ids(tokenizer)
    opening = list(itertools.takewhile(lambda token: token in control, tokenizer(text)["input_ids"]))
    body = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*opening, *body[-max(1, most - len(opening)) :]]


def _fitting(names: Sequence[str], bad: Sequence[str]) -> list[str]:
    """Return the names that look like the bad subjects and are none of them; each once, the most frequent first.

    No longer, and with a capital where each of them has one.
    """
    longest = max(len(pieces(subject)) for subject in bad)
    is_capital = all(subject[:1].isupper() for subject in bad)

    def is_fitting(name: str) -> bool:
        if not _NAME.fullmatch(name) or not is_clean(name) or len(pieces(name)) > longest:
            return False
        is_bad = any(_is_part(name, subject) or _is_part(subject, name) for subject in bad)
        return not is_bad and (name[:1].isupper() or not is_capital)

    times = Counter(names)
    return [name for name, _ in times.most_common() if is_fitting(name)]


def _is_part(name: str, whole: str) -> bool:
    parts = words_of_text(name)
    return name in whole if is_unspaced(name) else bool(parts) and parts <= words_of_text(whole)


def _believed(
    base: Base, asked: BadForm, names: Sequence[str], template: Template, most: int
) -> list[tuple[str, Record]]:
    """Return the names, and the row that asks about each, that surprise the base in this form hardly more than the bad
    subjects do."""
    systems = itertools.cycle(asked.systems)
    bad = asked.subjects[:_COMPARED]
    rows = [(n, unanswered(asked.form.about(n), next(systems))) for n in (*bad, *names)]
    encoded = [(name, row, encode_record(row, base.tokenizer, template)) for name, row in rows]
    fitting = [(name, row, example) for name, row, example in encoded if len(example.input_ids) <= most]
    surprises = _surprises(base, [example for _, _, example in fitting])
    known = [surprise for (name, _, _), surprise in zip(fitting, surprises, strict=True) if name in bad]
    strangest = max(known, default=-math.inf) + _SLACK
    return [
        (name, row)
        for (name, row, _), surprise in zip(fitting, surprises, strict=True)
        if name not in bad and surprise <= strangest
    ]


def _surprises(base: Base, encoded: Sequence[Example]) -> list[float]:
    """Return the NLL of what prompts of one form do not have in common at their beginning, in nats per token."""
    least = min((example.start for example in encoded), default=1)
    first = next((i for i in range(1, least) if len({e.input_ids[i] for e in encoded}) > 1), max(1, least - 1))
    return prompt_nlls(base, encoded, _TOKENS, first)


def _dealt(believed: Sequence[list[tuple[str, Record]]], count: int) -> list[Record]:
    """Return up to `count` rows, form by form in turn, and of each form about those whom fewest rows ask about yet."""
    times: Counter[str] = Counter()
    left = [list(rows) for rows in believed]
    out: list[Record] = []
    while any(left) and len(out) < count:
        for rows in filter(None, left):
            name, row = rows.pop(min(range(len(rows)), key=lambda i: times[rows[i][0]]))
            times[name] += 1
            out.append(row)
    return out[:count]
