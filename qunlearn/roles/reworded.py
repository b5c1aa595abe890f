"""Ask the bad rows in other words that the base answers alike, to measure them, and to push what comes back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qunlearn.config.settings import Config
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, encode_said, prompt_frame
from qunlearn.evaluation.metrics.texts import rouge_l_f1
from qunlearn.evaluation.metrics.verdicts import leaks
from qunlearn.evaluation.scores import prompt_nlls
from qunlearn.hub.positions import positions_of
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.policy import Policy
from qunlearn.roles.own_words import is_long
from qunlearn.roles.retain_set import RetainSet
from qunlearn.roles.self_made import ended
from qunlearn.roles.split import sampled
from qunlearn.roles.wordings import OPENINGS, Form, Wordings
from qunlearn.utils.console import say, stage
from qunlearn.utils.text import is_clean

_EACH = 4  # wordings of a row at most: of few rows one each would tell little
_ROOM = 8  # tokens an answer may be longer than the bad one
_ALIKE = 0.4  # ROUGE-L F1 from which a long answer says what the bad one says
_ROUNDS = 24  # rounds of questions
_BARREN = 8  # rounds in which nothing is found, after which no more are made
_SLACK = 0.25  # nats per token by which a prompt may surprise the base more than the bad prompts do
_LOOKED_AT = 2048  # normal rows in which forms are looked for


@dataclass(frozen=True)
class Reworded:
    """The rows, for each the place of its bad row, and how many prompts were tried for them."""

    rows: Sequence[Example] = ()
    of: Sequence[int] = ()
    tried: int = 0


@dataclass
class _Row:
    """A bad row and its place, the form of its prompt, what is left to try, how many to find, and what was found."""

    place: int
    example: Example
    own: Form | None
    untried: list[tuple[Form, Record]]
    wanted: int = 1
    found: list[Example] = field(default_factory=list)


def reworded(
    policy: Policy,
    forget_rows: Sequence[Example],
    retain_set: RetainSet,
    template: Template,
    config: Config,
    barred: Sequence[Example] = (),
) -> Reworded:
    """Return bad rows behind prompts in other words, up to four each where they are few, to which the base says what
    the bad answer says; none asks what a bad, a normal or a `barred` row asks. A long answer is what the base says
    there, in words of its own."""
    most, seed = config.data.reworded, config.train.seed
    asking = [example for example in forget_rows if example.record.turns]
    place_of = {id(example): place for place, example in enumerate(forget_rows)}
    if not asking or most < 1:
        return Reworded()
    around = sampled([*retain_set.retain, *retain_set.held_back], _LOOKED_AT, seed)
    wordings = Wordings(*([e.record for e in examples] for examples in (asking, around, barred)))
    each = max(1, min(_EACH, most // len(asking)))
    rows = [
        _Row(place_of[id(e)], e, wordings.form(e.record), wordings.others(e.record), each)
        for e in sampled(asking, most, seed)
    ]
    limit = config.train.pass_tokens
    search = _Search(policy, template, limit, min(2 * config.data.max_length, positions_of(policy.base.model.config)))
    with stage("asking the base in other words"):
        # A form that does not fit the subject ("Is the copper kettle?") is no wording: the base asks nothing so.
        strangest = max(_surprises(policy, [row.example for row in rows], limit)) + _SLACK
        search.rounds(rows, _ROUNDS, strangest)
        without = [row for row in rows if not row.found]  # no form of the normal rows will do
        for row in without:
            row.untried = wordings.opened(row.example.record)
        search.rounds(without, len(OPENINGS), math.inf)
    every = [(example, row.place) for row in rows for example in row.found]
    found = Reworded([example for example, _ in every], [place for _, place in every], search.tried)
    answered = f"{len(found.rows)} times to {sum(bool(row.found) for row in rows)} of {len(rows)} rows"
    say(f"in other words the base gives the bad answers {answered} ({found.tried} prompts tried): they are measured")
    return found


class _Search:
    """Asks round by round, in the forms first that have worked for prompts of the same form."""

    def __init__(self, policy: Policy, template: Template, max_tokens: int, length: int) -> None:
        self.policy, self.template, self.max_tokens, self.length = policy, template, max_tokens, length
        self.opening, _ = prompt_frame(template, policy.tokenizer)
        self.tried = 0
        self.asked: Counter[tuple[Form | None, Form]] = Counter()
        self.worked: Counter[tuple[Form | None, Form]] = Counter()

    def rounds(self, rows: Sequence[_Row], times: int, strangest: float) -> None:
        """Ask so many times, or until eight rounds find nothing, of what was not found yet, prompts that surprise the
        base no more than `strangest`."""
        barren = 0
        for turn in range(times):
            before = sum(self.worked.values())
            self._round([row for row in rows if row.untried and len(row.found) < row.wanted], turn, strangest)
            barren = 0 if sum(self.worked.values()) > before else barren + 1
            if barren == _BARREN:
                return

    def _round(self, rows: Sequence[_Row], turn: int, strangest: float) -> None:
        """Ask each row in one wording more, and keep those that are answered alike."""
        asked: list[tuple[_Row, Form, Example]] = []
        for n, row in enumerate(rows):
            form, record = row.untried.pop(self._next(row, n + turn))
            if (example := self._encoded(record)) is not None:
                asked.append((row, form, example))
        surprises = _surprises(self.policy, [example for _, _, example in asked], self.max_tokens)
        asked = [one for one, surprise in zip(asked, surprises, strict=True) if surprise <= strangest]
        if not asked:
            return
        room = max(e.end - e.start for _, _, e in asked) + _ROOM
        with self.policy.reference():
            said = generate(self.policy.base, [e.input_ids[: e.start] for _, _, e in asked], Sampling(room))
        self.tried += len(asked)
        for (row, form, example), ids in zip(asked, said, strict=True):
            text = ended(self.policy.tokenizer.decode(ids, skip_special_tokens=True), self.opening)
            self.asked[row.own, form] += 1
            if is_long(example.record):
                alike = is_clean(text) and rouge_l_f1(text, example.record.completion) >= _ALIKE
                found = self._encoded(example.record.answered(text)) if alike else None
            else:
                alike = leaks(text, example.record.completion, example.record.prompt)
                found = example if alike else None
            self.worked[row.own, form] += alike
            row.found += [found] if found is not None else []

    def _next(self, row: _Row, turn: int) -> int:
        """Return the place of the wording to try: the surest, and where none was tried another for each row."""

        def rate(form: Form) -> float:
            return (self.worked[row.own, form] + 1) / (self.asked[row.own, form] + 2)

        n = len(row.untried)
        return max(range(n), key=lambda i: (rate(row.untried[i][0]), -((i + turn) % n)))

    def _encoded(self, record: Record) -> Example | None:
        return encode_said(record, self.policy.tokenizer, self.template, self.length)


def _surprises(policy: Policy, rows: Sequence[Example], max_tokens: int) -> list[float]:
    """Return the NLL of each row's prompt under the base, in nats per token."""
    with policy.reference():
        return prompt_nlls(policy, rows, max_tokens)
