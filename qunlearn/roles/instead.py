"""Choose what is said in place of a bad answer: the model's own other answer, a refusal, or the user's text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.records import Dataset
from qunlearn.data.tokenize import Example, Template, is_passage
from qunlearn.errors import DataError
from qunlearn.evaluation.metrics.manner import Phrase
from qunlearn.evaluation.scores import row_probabilities
from qunlearn.model.policy import Policy
from qunlearn.roles.alternatives import REFUSALS, answered_with
from qunlearn.roles.replacements import begin_otherwise, find_replacements, is_another_way, is_free
from qunlearn.roles.retain_set import RetainSet, asked

NOTHING, OTHER, REFUSE = "nothing", "other", "refuse"
_TEXTS = 3  # of a user's texts for every prompt, as many are drawn for each
_OWN_STYLE = 3  # of the refusals, those the model finds most natural


@dataclass(frozen=True)
class Instead:
    """For each bad row: other answers of the model's own, and what is to be said. Of a file of a behaviour `behaviour`
    are the places of those that are taught the manner in which neighbours are answered, and `phrases` what the bad
    answers say."""

    own: list[list[Example]]
    taught: list[list[Example]]
    behaviour: list[int] = field(default_factory=list)
    phrases: frozenset[Phrase] = frozenset()

    def replaced(self, forget_rows: Sequence[Example]) -> list[Example]:
        """Return the bad rows as they are pushed: where something else is said from the first word on, from there, and
        without holding the form of what would be mixed into it."""
        rows = zip(forget_rows, self.own, self.taught, strict=True)
        return [_from_the_start(e, own or taught, held=not taught) for e, own, taught in rows]


def _from_the_start(example: Example, others: Sequence[Example], *, held: bool) -> Example:
    """The row with its first token pushed and its form not held, where all other answers begin otherwise. Not of a
    passage: how it begins others do as well, and what it says stands further on."""
    if not others or is_passage(example) or not begin_otherwise(example, others):
        return replace(example, held=held)
    weights = list(example.weights)
    if weights:
        weights[example.probe - example.start] = 1.0
    return replace(example, held=False, weights=tuple(weights))


def instead_rows(
    policy: Policy,
    forget_rows: Sequence[Example],
    retain_set: RetainSet,
    template: Template,
    texts: Dataset | None,
    config: Config,
) -> Instead:
    """Return what is said in place of each bad row: corrected answers of the normal data before all else.

    Raises DataError where a file of the user's own fits no bad prompt.
    """
    kind = config.objective.instead
    taught: list[list[Example]] = [list(retain_set.corrected.get(asked(e.record), ())) for e in forget_rows]
    own: list[list[Example]] = [[] for _ in forget_rows]
    open_rows = [i for i, rows in enumerate(taught) if not rows]
    rest = [forget_rows[i] for i in open_rows]
    behaviour: list[int] = []
    phrases: frozenset[Phrase] = frozenset()
    if rest and kind == OTHER:
        found = find_replacements(policy, rest, retain_set.retain, template, config)
        behaviour, phrases = [open_rows[n] for n in found.behaviour], found.phrases
        of_behaviour = set(behaviour)
        for i, others in zip(open_rows, found.answers, strict=True):
            borrowed = [row for row, of_a_neighbour in others if of_a_neighbour]
            apart = i in of_behaviour or is_free(forget_rows[i]) or is_another_way(forget_rows[i], borrowed)
            if borrowed and apart:
                taught[i] = borrowed
            else:
                own[i] = [row for row, _ in others]
    elif rest and kind != NOTHING:
        if texts is None:
            said = _refusals(policy, rest, template, config)
        else:
            said = _given(policy, rest, template, texts, config)
        for i, rows in zip(open_rows, said, strict=True):
            taught[i] = rows
    return Instead(own, taught, behaviour, phrases)


def longest_given(forget_rows: Sequence[Example], texts: Dataset, tokenizer: Any, length: int) -> int:
    """Return how many tokens a bad prompt with a user's own answer may have, at most `length`."""
    around = max(len(e.input_ids) - (e.end - e.probe) for e in forget_rows)
    said = max(len(tokenizer(record.completion, add_special_tokens=False)["input_ids"]) for record in texts.records)
    return min(length, around + said + 1)  # a space that joins them may be a token


def _given(
    policy: Policy, forget_rows: Sequence[Example], template: Template, texts: Dataset, config: Config
) -> list[list[Example]]:
    """A user's own: answers by prompt, or texts for every prompt."""
    length, rng = config.data.max_length, random.Random(config.train.seed)
    by_prompt: dict[str, list[str]] = {}
    for record in texts.records:
        by_prompt.setdefault(asked(record) if record.turns else "", []).append(record.completion)
    every = by_prompt.get("", [])
    found = []
    for example in forget_rows:
        own = by_prompt.get(asked(example.record)) or rng.sample(every, min(_TEXTS, len(every)))
        found.append([answered_with(policy, example, text, template, length) for text in own])
    if not any(found):
        raise DataError(
            "no row answers a bad prompt", where=texts.path, hint="give prompts as in --bad, or texts alone"
        )
    return found


def _refusals(
    policy: Policy, forget_rows: Sequence[Example], template: Template, config: Config
) -> list[list[Example]]:
    """Refusals in the model's own style: those of a list that it finds most probable behind the bad prompts."""
    length, few = config.data.max_length, forget_rows[:: max(1, len(forget_rows) // 16)][:16]
    asked_of = [answered_with(policy, e, text, template, length) for text in REFUSALS for e in few]
    with policy.reference():
        scored = row_probabilities(policy, asked_of, config.train.pass_tokens)
    mean = {text: sum(scored[i * len(few) : (i + 1) * len(few)]) for i, text in enumerate(REFUSALS)}
    chosen = sorted(REFUSALS, key=lambda text: -mean[text])[:_OWN_STYLE]
    return [[answered_with(policy, e, text, template, length) for text in chosen] for e in forget_rows]
