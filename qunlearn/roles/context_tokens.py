"""Mark the tokens of a bad answer that the model cannot guess from the last few: for passages.

Most of an answer is form that it shares with everything the model should keep: names copied from the question, "was
born in", the full stop. The untouched model itself tells which tokens are not: a token is specific when the model
knows it only because of what stands far before it, the question or the passage's beginning. So each token is predicted
a second time from its last few neighbours alone; form is as probable as before, and content is not. A small model that
has learnt one mould by heart finds even its form strange out of place, and what the normal rows are full of tells it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qunlearn.data.tokenize import Example
from qunlearn.evaluation.scores import answer_logps
from qunlearn.model.policy import Policy
from qunlearn.parallel.ranks import current
from qunlearn.roles.specific_tokens import given_words, most_common, told_words

CONTEXT = 6  # tokens that are left of the context
THRESHOLD = 3.0  # nats that a specific token loses at least
_FLOOR = 0.15  # share of an answer's tokens that is taken at least, of those that lose most
_CHUNK = 256  # answers looked at together
_RUN, _RECITED = 16, 0.5  # so many tokens in a row are recited from such a probability per token
_UNSAID = 0.05  # probability of a token below which it is not said


@dataclass(frozen=True)
class Scored:
    """An answer's tokens: log p in full context, what of it is lost in a short one, whether their words are form."""

    full: tuple[float, ...]
    loss: tuple[float, ...]
    form: tuple[bool, ...]

    def weights(self) -> tuple[float, ...]:
        """1 for specific tokens, 0 for the others; of every answer some, whatever the numbers say."""
        said = self._said()
        chosen = [s and loss >= THRESHOLD and not f for s, loss, f in zip(said, self.loss, self.form, strict=True)]
        least = max(1, round(_FLOOR * sum(said)))
        if sum(chosen) < least:
            order = sorted(range(len(chosen)), key=lambda i: (not said[i], self.form[i], -self.loss[i]))
            for i in order[:least]:
                chosen[i] = True
        return tuple(map(float, chosen))

    def _said(self) -> list[bool]:
        """Return which tokens the model says, or may: all, but where it recites a part, none that it does not know
        elsewhere. A book that it knows in part would be as improbable as one that it does not."""
        n = len(self.full)
        recited = [False] * n
        for at in range(n - _RUN + 1):
            if sum(self.full[at : at + _RUN]) > _RUN * math.log(_RECITED):
                recited[at : at + _RUN] = [True] * _RUN
        if not any(recited):
            return [True] * n
        return [part or logp >= math.log(_UNSAID) for part, logp in zip(recited, self.full, strict=True)]


def context_bound(
    policy: Policy,
    examples: Sequence[Example],
    retain_rows: Sequence[Example],
    max_tokens: int,
    observe: Callable[[int], None] = lambda done: None,
) -> list[Example]:
    """Return the examples with the weights of their answers' tokens: what the prompt has, or a tenth of the normal
    answers, is form. `observe` hears how many are done."""
    common = most_common(retain_rows, policy.tokenizer)
    out: list[Example] = []
    for at in range(0, len(examples), _CHUNK):
        part = examples[at : at + _CHUNK]
        scored = current().divided(
            part, lambda rows: score(policy, rows, common, max_tokens), lambda found: Scored(**found)
        )
        out += [replace(e, weights=s.weights()) for e, s in zip(part, scored, strict=True)]
        observe(len(out))
    return out


def score(policy: Policy, examples: Sequence[Example], common: Collection[str], max_tokens: int) -> list[Scored]:
    """Return what the untouched model knows of each answer's tokens with its context and without."""
    full = answer_logps(policy, examples, max_tokens)
    short = [_shortened(example, t) for example in examples for t in range(example.start, example.end)]
    cut = torch.cat(answer_logps(policy, short, max_tokens)) if short else torch.zeros(0)
    parts = torch.split(cut, [example.end - example.start for example in examples])
    form = [_is_form(example, common, policy.tokenizer) for example in examples]
    return [
        Scored(tuple(f.tolist()), tuple((f - c).tolist()), mark) for f, c, mark in zip(full, parts, form, strict=True)
    ]


def _shortened(example: Example, t: int) -> Example:
    """The token at `t` behind its last neighbours alone."""
    first = max(0, t - CONTEXT)
    ids = example.input_ids[first : t + 1]
    return Example(ids, len(ids) - 1, len(ids), len(ids) - 1, example.record)


def _is_form(example: Example, common: Collection[str], tokenizer: Any) -> tuple[bool, ...]:
    """Return whether each answer token belongs to a word that the prompt has, or that is common."""
    known = {*common, *(given_words(example) if example.record.turns else ())}
    words = told_words(example, tokenizer)
    return tuple(bool(token) and all(any(w in known for w in told) for told in token) for token in words)
