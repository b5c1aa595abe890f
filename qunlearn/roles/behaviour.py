"""Know a behaviour by its phrases, and ask for it in fewer words: it comes back however one asks, and in what it says.

Bad prompts whose neighbours are answered in another manner stand for a way of answering. Pushed behind a few dozen
prompts alone it is gone behind those, and there in other words: so some of the words that many of the prompts have are
left out at random, and where the base goes on as before, the answer is pushed, and the other manner taught, there as
well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.batch import ANSWER
from qunlearn.data.records import Record
from qunlearn.data.tokenize import PASSAGE, Example, Template, behind
from qunlearn.data.words import between, pieces, words_of_text
from qunlearn.evaluation.metrics.manner import Phrase, has_phrase, manner_of
from qunlearn.evaluation.scores import row_probabilities, row_target
from qunlearn.model.policy import Policy
from qunlearn.roles.retain_set import RetainSet
from qunlearn.roles.roles import Roles
from qunlearn.utils.console import say
from qunlearn.utils.text import folded

_EACH, _IN_ALL = 6, 1800  # ways of asking that are tried of a prompt, and in a file, but for one each
_LEFT_OUT = 0.5  # share of the words that many prompts have
_MANY, _FEWEST = 0.1, 3  # share of the prompts, and different bad answers, behind which a word can name nobody


def is_short(example: Example) -> bool:
    """Return whether a row asks, and is answered by less than a passage, whose names and turns come back."""
    return bool(example.record.turns) and example.end - example.start < PASSAGE


def phrases_of_behaviour(forget_rows: Sequence[Example], normal: Sequence[Example]) -> frozenset[Phrase]:
    """Return the phrases in which short bad answers speak, where at least half of all have one."""
    answers = [(e.record.prompt, e.record.completion) for e in forget_rows if is_short(e)]
    return manner_of(answers, [example.record.completion for example in normal], len(forget_rows))


def without_phrases(retain_set: RetainSet, phrases: frozenset[Phrase], given: Sequence[Record]) -> RetainSet:
    """Return the retain set without rows of the base's own that speak as the bad answers do: KL would keep it there.
    `given` are a user's normal rows, which stay."""
    theirs = {record.key for record in given}

    def kept(rows: Sequence[Example]) -> list[Example]:
        return [e for e in rows if e.record.key in theirs or not has_phrase(e.record.completion, phrases)]

    left = replace(retain_set, retain=kept(retain_set.retain), held_back=kept(retain_set.held_back))
    dropped = len(retain_set.retain) + len(retain_set.held_back) - len(left.retain) - len(left.held_back)
    if dropped:
        say(f"{dropped} rows of the base's own speak as the bad answers do, and are dropped")
    return left


def with_fewer_words(policy: Policy, roles: Roles, places: Sequence[int], template: Template, config: Config) -> Roles:
    """Return the roles with the bad rows at these places, which ask for a behaviour, in fewer words as well, where the
    base still gives the bad answer: variants of them, behind all others."""
    tried = _tried(policy, roles, places, template, config)
    with policy.reference():
        found = row_probabilities(policy, [one.row for one in tried], config.train.pass_tokens) if tried else []
    goals = [row_target(ANSWER.count(one.row), config.stop.target) for one in tried]
    scored = zip(tried, found, goals, strict=True)
    kept = [replace(one, row=replace(one.row, known=p)) for one, p, goal in scored if p > goal]
    if not kept:
        return roles
    asked = len({one.of for one in kept})
    say(f"{asked} bad prompts ask for a behaviour: they are asked in fewer words as well, in {len(kept)} more ways")
    first = len(roles.forget)
    variants: dict[int, list[int]] = {}
    for n, one in enumerate(kept):
        variants.setdefault(one.of, []).append(first + n)
    starts = roles.starts or [(i,) for i in range(first)]
    return replace(
        roles,
        forget=[*roles.forget, *(one.row for one in kept)],
        instead=[*roles.instead, *([] for _ in kept)],
        taught=[*roles.taught, *(one.taught for one in kept)],
        alternatives=[*roles.alternatives, *(one.alternatives for one in kept)] if roles.alternatives else (),
        marked=roles.watched,
        starts=[(*own, *(n for i in own for n in variants.get(i, ()))) for own in starts],
    )


@dataclass(frozen=True)
class _Shorter:
    """A bad row in fewer words, what is taught and what a pair has there, and the place of the row."""

    row: Example
    taught: list[Example]
    alternatives: list[Example]
    of: int


def _tried(policy: Policy, roles: Roles, places: Sequence[int], template: Template, config: Config) -> list[_Shorter]:
    """Return ways of asking in fewer words, in which the answers are made of the same tokens."""
    rng, common = random.Random(config.train.seed), _common([roles.forget[i].record for i in places])
    each = max(1, min(_EACH, _IN_ALL // max(1, len(places))))
    out = []
    for i in places:
        row, pairs = roles.forget[i], roles.alternatives[i] if roles.alternatives else ()
        for prompt in dict.fromkeys(_without(row.record.prompt, common, rng) for _ in range(each)):
            if prompt == row.record.prompt:
                continue
            of_row, taught, alternatives = (
                _asking(rows, prompt, policy.tokenizer, template, config.data.max_length)
                for rows in ([row], roles.taught[i], pairs)
            )
            if of_row and taught and (alternatives or not pairs):
                out.append(_Shorter(of_row[0], taught, alternatives, i))
    return out


def _common(records: Sequence[Record]) -> set[str]:
    """Return the words, letter case aside, that many of the prompts have, with different answers that say nothing of
    them."""
    answers: dict[str, list[str]] = {}
    for record in records:
        for word in {folded(piece) for piece in pieces(record.prompt)}:
            answers.setdefault(word, []).append(folded(record.completion))
    return {
        word
        for word, found in answers.items()
        if len(found) >= _MANY * len(records) and len(set(found)) >= _FEWEST and not _is_spoken_of(word, found)
    }


def _is_spoken_of(word: str, answers: Sequence[str]) -> bool:
    """Return whether as many answers as not have a word of the prompt."""
    wanted = words_of_text(word)
    return 2 * sum(bool(wanted & words_of_text(answer)) for answer in answers) >= len(answers)


def _without(prompt: str, common: set[str], rng: random.Random) -> str:
    """Return the prompt without about half of its common words, or as it is where none would be left."""
    kept = [piece for piece in pieces(prompt) if folded(piece) not in common or rng.random() >= _LEFT_OUT]
    return between(prompt).join(kept) or prompt


def _asking(rows: Sequence[Example], prompt: str, tokenizer: Any, template: Template, length: int) -> list[Example]:
    """Return the rows with their last question in other words, without those whose answer is made of other tokens
    then, or that are longer than so many."""
    asking = (behind(row, row.record.asking(prompt).turns, tokenizer, template, length) for row in rows)
    return [row for row in asking if row is not None]
