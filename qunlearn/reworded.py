"""The bad rows asked in other words that the base answers alike: never trained on, only measured."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qunlearn.data.choices import is_clean
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, encode_record
from qunlearn.data.wordings import OPENINGS, Form, Wordings, opened
from qunlearn.evaluate.metrics.judge import leaks
from qunlearn.evaluate.metrics.texts import rouge_l_f1, words
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.policy import Policy

_ROOM = 8  # tokens an answer may be longer than the bad one
_LONG, _ALIKE = 12, 0.4  # words that an answer adds to its prompt from which likeness (ROUGE-L F1) tells what it says
_ROUNDS = 12


@dataclass(frozen=True)
class Reworded:
    """The rows, and how many prompts were tried for them."""

    rows: Sequence[Example] = ()
    tried: int = 0


@dataclass
class _Row:
    """A bad row, the form of its prompt, what is left to try, and what was found."""

    example: Example
    own: Form | None
    untried: list[tuple[Form, Record]]
    found: Example | None = None


def reworded(
    policy: Policy,
    bad: Sequence[Example],
    normal: Sequence[Record],
    template: Template,
    *,
    most: int,
    length: int,
    seed: int,
    barred: Sequence[Record] = (),
) -> Reworded:
    """Return at most `most` bad rows, each of at most `length` tokens, behind a prompt in other words to which the base
    says what the bad answer says, with what it says. Prompts of `barred` are not among them."""
    asking = [example for example in bad if example.record.turns]
    if not asking or most < 1:
        return Reworded()
    wordings = Wordings([example.record for example in asking], normal, barred)
    chosen = random.Random(seed).sample(asking, min(most, len(asking)))
    rows = [_Row(e, wordings.form(e.record), wordings.others(e.record)) for e in chosen]
    search = _Search(policy, template, length)
    search.rounds(rows, _ROUNDS)
    for row in rows:  # where no form of the normal rows will do
        row.untried = opened(row.example.record)
    search.rounds(rows, len(OPENINGS))
    return Reworded([row.found for row in rows if row.found is not None], search.tried)


class _Search:
    """Asks round by round, in the forms first that have worked for prompts of the same form."""

    def __init__(self, policy: Policy, template: Template, length: int) -> None:
        self.policy, self.template, self.length = policy, template, length
        self.tried = 0
        self.asked: Counter[tuple[Form | None, Form]] = Counter()
        self.worked: Counter[tuple[Form | None, Form]] = Counter()

    def rounds(self, rows: Sequence[_Row], times: int) -> None:
        """Ask so many times, of what was not found yet."""
        for turn in range(times):
            self._round([row for row in rows if row.untried and row.found is None], turn)

    def _round(self, rows: Sequence[_Row], turn: int) -> None:
        """Ask each row in one wording more, and keep those that are answered alike."""
        asked: list[tuple[_Row, Form, Example]] = []
        for n, row in enumerate(rows):
            form, record = row.untried.pop(self._next(row, n + turn))
            if (example := self._encoded(record)) is not None:
                asked.append((row, form, example))
        if not asked:
            return
        room = max(e.end - e.start for _, _, e in asked) + _ROOM
        with self.policy.reference():
            said = generate(self.policy.base, [e.input_ids[: e.start] for _, _, e in asked], Sampling(room))
        self.tried += len(asked)
        for (row, form, example), ids in zip(asked, said, strict=True):
            text = self.policy.tokenizer.decode(ids, skip_special_tokens=True).strip()
            self.asked[row.own, form] += 1
            if is_clean(text) and _alike(text, example.record):
                self.worked[row.own, form] += 1
                row.found = self._encoded(replace(example.record, completion=text))

    def _next(self, row: _Row, turn: int) -> int:
        """Return the place of the wording to try: the surest, and where none was tried another for each row."""

        def rate(form: Form) -> float:
            return (self.worked[row.own, form] + 1) / (self.asked[row.own, form] + 2)

        n = len(row.untried)
        return max(range(n), key=lambda i: (rate(row.untried[i][0]), -((i + turn) % n)))

    def _encoded(self, record: Record) -> Example | None:
        example = encode_record(record, self.policy.tokenizer, self.template)
        return example if len(example.input_ids) <= self.length else None


def _alike(text: str, record: Record) -> bool:
    """Whether an output says what the answer says: a long one in words of its own."""
    given = set(words(record.prompt))
    if sum(word not in given for word in words(record.completion)) <= _LONG:
        return leaks(text, record.completion, record.prompt)
    return rouge_l_f1(text, record.completion) >= _ALIKE
