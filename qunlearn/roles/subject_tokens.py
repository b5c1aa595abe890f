"""Mark the tokens of an answer that the model knows only because of whom it was asked about.

An answer mostly names its subject again, so its last few tokens alone still tell the model whom it speaks of. Here the
subject is exchanged instead, in prompt and answer, for one that a neighbouring prompt asks about: what the model finds
as probable of a stranger is form, or what is said of many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, encode_record
from qunlearn.evaluation.scores import answer_logps
from qunlearn.hub.positions import positions_of
from qunlearn.model.policy import Policy
from qunlearn.roles.neighbours import Neighbours, telling_words
from qunlearn.roles.specific_tokens import completing, words_of

STRANGERS = 4  # subjects that each answer is tried with
THRESHOLD = 1.0  # nats that a token about the subject loses at least, when it is about a stranger
_CHUNK = 64  # answers looked at together, and as many times as there are strangers
_LEAST = 0.05  # share of an answer's tokens that are about its subject at least: else the answer is about no subject


def subject_bound(
    policy: Policy, forget_rows: Sequence[Example], retain_rows: Sequence[Record], template: Template, max_tokens: int
) -> list[Example | None]:
    """Return the examples with weight 1 for tokens that are about their subject; None where that tells nothing."""
    out: list[Example | None] = []
    for example, lost in zip(forget_rows, losses(policy, forget_rows, retain_rows, template, max_tokens), strict=True):
        chosen = _whole_words([loss >= THRESHOLD for loss in lost or ()], example, policy.tokenizer)
        enough = sum(chosen) >= max(1, _LEAST * len(chosen))
        out.append(replace(example, weights=tuple(map(float, chosen))) if enough else None)
    return out


def also_bound(
    policy: Policy,
    weighed: Sequence[Example],
    doubtful: Sequence[Sequence[bool]],
    retain_rows: Sequence[Record],
    template: Template,
    max_tokens: int,
) -> list[Example]:
    """Return the examples with weight 1 as well for doubtful words that are about their subject."""
    out = []
    asked = zip(weighed, doubtful, losses(policy, weighed, retain_rows, template, max_tokens), strict=True)
    for example, in_doubt, lost in asked:
        words = words_of(example.input_ids[example.start : example.end], policy.tokenizer)
        tokens = zip(words, in_doubt, lost or (), strict=False)
        bound = {word for token, doubt, loss in tokens if doubt and loss >= THRESHOLD for word in token}
        also = (doubt and not bound.isdisjoint(token) for token, doubt in zip(words, in_doubt, strict=True))
        weights = tuple(max(weight, float(yes)) for weight, yes in zip(example.weights, also, strict=True))
        out.append(replace(example, weights=weights))
    return out


def _whole_words(chosen: list[bool], example: Example, tokenizer: Any) -> list[bool]:
    """Return the choice with the rest of each word whose beginning is chosen: it follows from it.

    Of the tokens that make a character together the last one has its word: it follows from those before it, and these
    are chosen for themselves alone.
    """
    ids = example.input_ids[example.start : example.end]
    words, completes = words_of(ids, tokenizer), completing(ids, tokenizer)
    before: list[str] = []  # the words of the last token that completed a character, if it is chosen
    begun = False
    for i, is_chosen in enumerate(chosen):
        if not completes[i]:
            begun = begun or is_chosen
            continue
        if words[i] and (begun or (before and words[i][0] == before[-1])):
            chosen[i] = True
        before, begun = words[i] if chosen[i] else [], False
    return chosen


def losses(
    policy: Policy, forget_rows: Sequence[Example], retain_rows: Sequence[Record], template: Template, max_tokens: int
) -> list[tuple[float, ...] | None]:
    """Return, for each answer's tokens, the nats lost where it is about strangers; None without any stranger.

    Tokens of the subject itself have none: minus infinity.
    """
    records = [example.record for example in forget_rows]
    around, telling = Neighbours([*records, *retain_rows]), telling_words(records, retain_rows)
    most = positions_of(policy.base.model.config)

    def about_strangers(record: Record) -> list[Example]:
        told = itertools.islice(around.strangers(record, telling), STRANGERS)
        rows = [encode_record(other, policy.tokenizer, template) for other in told]
        return [row for row in rows if len(row.input_ids) <= most]  # a prompt that was cut to fit is whole again here

    out: list[tuple[float, ...] | None] = []
    for at in range(0, len(forget_rows), _CHUNK):
        part = forget_rows[at : at + _CHUNK]
        others = [about_strangers(example.record) for example in part]
        known = answer_logps(policy, part, max_tokens)
        found = iter(answer_logps(policy, [row for rows in others for row in rows], max_tokens))
        for example, own, rows in zip(part, (p.tolist() for p in known), others, strict=True):
            theirs = [_aligned(example, row, next(found).tolist()) for row in rows]
            out.append(tuple(_loss(p, [t[i] for t in theirs]) for i, p in enumerate(own)) if theirs else None)
    return out


def _loss(own: float, others: Sequence[float | None]) -> float:
    """Return what is lost in the mean over strangers, of those whose answer has the token."""
    there = [math.exp(p) for p in others if p is not None]
    return own - math.log(max(sum(there) / len(there), 1e-9)) if there else -math.inf


def _aligned(example: Example, theirs: Example, logps: Sequence[float]) -> list[float | None]:
    """Return the log probability of each answer token where it stands in their answer; None where it does not."""
    mine, other = (e.input_ids[e.start : e.end] for e in (example, theirs))
    out: list[float | None] = [None] * len(mine)
    for a, b, size in SequenceMatcher(None, mine, other, autojunk=False).get_matching_blocks():
        out[a : a + size] = logps[b : b + size]
    return out
