"""Find the strength at which a corrupted model scores as one that never knew: |S(strength) - v| is made small.

S is the mean, over the rows to forget, of the answer's probability per token behind its corrupted prompt; for raw
templates, whose prompts and answers have no border, of the greedy answer's ROUGE-L recall. v, the surrogate, is the
same of a retrained model, or of the base asked about invented subjects: facts that it cannot know.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, answer_text, encode_record
from qunlearn.data.words import bounded
from qunlearn.evaluation.metrics.texts import rouge_l_recall
from qunlearn.evaluation.scores import greedy_outputs, row_probabilities
from qunlearn.guard.prompts import invented
from qunlearn.guard.subjects import Subjects
from qunlearn.model.language_model import LanguageModel

Score = Callable[[float], float]
_GRID = tuple(10 ** (n / 2) for n in range(-2, 7))  # times an embedding's mean norm
_HALVINGS = 4
_TRIES = 8  # inventions of a name
AGNOSTIC = 10.0  # times an embedding's mean norm: what nothing is left of
# The published search (Phi-3-mini, WMDP): start, half a difference's width, rate, steps, smallest strength.
_START, _EPSILON, _RATE, _STEPS, _SMALLEST = 0.1, 0.0999, 100.0, 10, 1e-8


@dataclass(frozen=True)
class Found:
    """The strength, the score there, and every (strength, score) on the way."""

    strength: float
    score: float
    curve: tuple[tuple[float, float], ...]


def row_scores(lm: LanguageModel, examples: Sequence[Example], max_tokens: int, *, framed: bool) -> float:
    """Return the mean score of rows under a model as it stands: see the module."""
    if framed:
        rows = row_probabilities(lm, examples, max_tokens)
    else:
        outputs = greedy_outputs(lm, examples)
        pairs = zip(examples, outputs, strict=True)
        rows = [rouge_l_recall(output.text, answer_text(e, lm.tokenizer)) for e, output in pairs]
    return sum(rows) / len(rows)


def placebos(bad: Sequence[Record], normal: Sequence[Record], seed: int) -> list[Record]:
    """Return bad rows about invented subjects, in prompt and answer; of rows whose subject no neighbour tells, none."""
    subjects, rng = Subjects(bad, normal), random.Random(seed)
    out = []
    for i, record in enumerate(bad):
        subject = subjects.of(i)
        if subject is None or not record.turns:
            continue
        names = (invented(subject, rng) for _ in range(_TRIES))
        name = next((name for name in names if not subjects.named_in(name)), None)
        if name is None:  # of two characters every second invention is the name itself
            continue
        exchanged = partial(re.compile(bounded(subject)).sub, name.replace("\\", r"\\"))
        turns = tuple((role, exchanged(text)) for role, text in record.turns)
        out.append(replace(record, turns=turns, completion=exchanged(record.completion)))
    return out


def encoded(records: Sequence[Record], lm: LanguageModel, template: Template, length: int) -> list[Example]:
    return [encode_record(record, lm.tokenizer, template, length) for record in records]


def bracket(score: Score, target: float, norm: float, most: float) -> Found:
    """Return the smallest strength whose score is at most the target: a coarse climb, then halvings in the logarithm.

    Where none is, that of the score nearest to the target. norm: an embedding's mean; most: the largest allowed.
    """
    curve: list[tuple[float, float]] = []

    def at(strength: float) -> float:
        curve.append((strength, score(strength)))
        return curve[-1][1]

    low, high = None, None
    for step in _GRID:
        strength = min(step * norm, most)
        if at(strength) <= target:
            high = strength
            break
        low = strength
        if strength == most:
            break
    if high is None:
        best = min(curve, key=lambda point: abs(point[1] - target))
        return Found(*best, tuple(curve))
    for _ in range(_HALVINGS if low is not None else 0):
        middle = math.sqrt(float(low or high) * high)
        if at(middle) <= target:
            high = middle
        else:
            low = middle
    return Found(high, dict(curve)[high], tuple(curve))


def zeroth_order(score: Score, target: float, most: float) -> Found:
    """Return what the published zeroth-order search finds: g = (S(b + e) - S(b - e)) / 2e, b <- b - rate * g, of the
    distance to the target, until the score is at most the target or the steps are spent."""
    curve: list[tuple[float, float]] = []

    def at(strength: float) -> float:
        curve.append((strength, score(strength)))
        return curve[-1][1]

    strength = _START
    for _ in range(_STEPS):
        above = at(min(strength + _EPSILON, most))
        if above <= target:
            return Found(*curve[-1], tuple(curve))
        below = at(max(strength - _EPSILON, _SMALLEST))
        slope = (abs(above - target) - abs(below - target)) / (2 * _EPSILON)
        strength = min(max(strength - _RATE * slope, _SMALLEST), most)
    at(strength)
    best = min(curve, key=lambda point: abs(point[1] - target))
    return Found(*best, tuple(curve))
