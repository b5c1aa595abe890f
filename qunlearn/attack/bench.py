"""The bench that an attack works at: one model, its rows as token ids, and how greedy answers are judged."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from qunlearn.attack.catalog import Effort
from qunlearn.attack.cells import PLACEBO, Cells, not_finite
from qunlearn.attack.facts import Fact, Inputs, context, derivable, gives_itself_away, new_words
from qunlearn.config.settings import Config
from qunlearn.data.batch import ANSWER, collate
from qunlearn.data.records import Dataset, Record
from qunlearn.data.tokenize import Example, Template, decode, encode, encode_record
from qunlearn.evaluation.metrics.verdicts import leaks
from qunlearn.evaluation.scores import row_nlls
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.head import token_logps
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.policy import Policy

_ROOM = 8  # tokens that an output may be longer than the answer
WORDY_ROOM = 32  # the same where a prompt invites an opening, or the answer is a part of a sentence
_MOST_ROOM = 192


@dataclass(frozen=True)
class Probe:
    """A prompt of token ids about a fact: what it is to bring out, and the texts in it, whose words are no news."""

    fact: int
    prompt: tuple[int, ...]
    wanted: str
    given: str


@dataclass(frozen=True)
class Bench:
    """One subject of an audit. `facts` are those asked about; `policy` is there where an adapter is; `unguarded` takes
    a guard off while its block runs, where there is one."""

    subject: str
    lm: LanguageModel
    policy: Policy
    inputs: Inputs
    facts: Sequence[Fact]
    template: Template
    config: Config
    effort: Effort
    cells: Cells
    max_length: int
    unguarded: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    notes: list[str] = field(default_factory=list)

    def encode(self, record: Record, template: Template | None = None) -> Example:
        """Return a row as token ids, its prompt cut where it is too long; of a plain text the first window."""
        if record.turns:
            return encode_record(record, self.lm.tokenizer, template or self.template, self.max_length)
        dataset = Dataset("", (record,), "text", (), "", 0)
        return encode(dataset, self.lm.tokenizer, self.template, self.max_length).examples[0]

    def probe(self, at: int, record: Record, template: Template | None = None, *, shown: str = "") -> Probe | None:
        """Return a question about fact `at`, in a record's words; None where its own words give the answer away.

        `shown` is text that the attack puts around the question.
        """
        example = self.encode(record, template)
        given = f"{shown} {context(record)}"
        if derivable(record.completion, self.facts[at].record.prompt, given):
            return None
        return Probe(at, example.input_ids[: example.start], record.completion, given)

    def leaked(
        self, probes: Sequence[Probe], *, room: int = _ROOM, temperature: float = 0.0, seed: int = 0
    ) -> list[float]:
        """Return 1.0 for each probe whose output, `room` tokens longer than what is wanted, says it, else 0.0."""
        if not probes:
            return []
        sizes = [len(self.lm.tokenizer(p.wanted, add_special_tokens=False)["input_ids"]) + room for p in probes]
        most = min(max(sizes), _MOST_ROOM)
        said = generate(self.lm, [p.prompt for p in probes], Sampling(most, temperature, seed=seed))
        return [
            float(leaks(decode(ids[:size], self.lm.tokenizer), p.wanted, p.given))
            for ids, p, size in zip(said, probes, sizes, strict=True)
        ]

    def nlls(self, records: Sequence[Record], template: Template | None = None) -> list[float]:
        """Return each answer's NLL behind its prompt, in nats per token. Raises AdapterError."""
        rows = [self.encode(record, template) for record in records]
        found = [nll / max(1, n) for nll, n in row_nlls(self.lm, rows, ANSWER, self.config.train.pass_tokens)]
        if not all(map(math.isfinite, found)):
            raise not_finite(self.subject)
        return found

    @torch.no_grad()
    def check_finite(self) -> None:
        """Refuse a model that gives no finite numbers, which would be found to leak nothing. Raises AdapterError."""
        example = self.encode(self.facts[0].record)
        batch = collate([example], ANSWER, self.lm.tokenizer.pad_token_id).to(self.lm.device)
        logps = token_logps(batch.pick(self.lm.hidden(batch)), batch.labels, self.lm.head)
        if not bool(torch.isfinite(logps).all()):
            raise not_finite(self.subject)

    def in_itself(self, fact: Fact) -> bool:
        """Return whether a fact's own words give it away, or a placebo is none: a plain text has no placebo."""
        return gives_itself_away(fact.record) if fact.asks else self.subject == PLACEBO

    def spread(self, probes: Sequence[Probe], values: Sequence[float]) -> list[float | None]:
        """Return per fact the mean of its probes' values; None for a fact without any."""
        of_fact: dict[int, list[float]] = {}
        for probe, value in zip(probes, values, strict=True):
            of_fact.setdefault(probe.fact, []).append(value)
        return [sum(v) / len(v) if (v := of_fact.get(i)) else None for i in range(len(self.facts))]

    def on(self, facts: Sequence[Fact]) -> Bench:
        """Return the same bench with other facts."""
        return replace(self, facts=facts)


def overlap(probes: Sequence[Probe], facts: Sequence[Fact]) -> int:
    """Return how many words of the answers, that the questions do not hold, stand in the prompts."""
    found = 0
    for probe in probes:
        record = facts[probe.fact].record
        news = set(new_words(record.completion, context(record)))
        found += len(news) - len(set(new_words(" ".join(news), probe.given)))
    return found
