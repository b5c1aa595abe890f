"""The measures of the before/after table, each from per-row scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowScore:
    """One row under one model.

    `nll` and `tokens` are over the answer's tokens; `all_nll` and `all_tokens` over every token that has one
    before it; `answer` and `output` are texts, `output` greedy.
    """

    nll: float
    tokens: int
    all_nll: float
    all_tokens: int
    answer: str
    output: str

    @property
    def probability(self) -> float:
        """Geometric mean of the answer tokens' probabilities: exp(-NLL / tokens) (TOFU's answer probability)."""
        return math.exp(-self.nll / self.tokens)

    @property
    def exact(self) -> bool:
        """Greedy output equal to the answer, surrounding white space aside."""
        return self.output.strip() == self.answer.strip()


@dataclass(frozen=True)
class SetScore:
    """A data set under one model: means over rows, perplexity over tokens."""

    n: int
    probability: float
    exact_match: float
    perplexity: float


def aggregate(rows: Sequence[RowScore]) -> SetScore:
    """Means over rows; perplexity = exp(sum of NLL / number of tokens) over all tokens of the set."""
    if not rows:
        raise ValueError("no rows to aggregate")
    tokens = sum(r.all_tokens for r in rows)
    mean_nll = sum(r.all_nll for r in rows) / tokens
    return SetScore(
        n=len(rows),
        probability=sum(r.probability for r in rows) / len(rows),
        exact_match=sum(r.exact for r in rows) / len(rows),
        # An overflow would be a perplexity nobody can read; exp(100) says the same.
        perplexity=math.exp(min(mean_nll, 100.0)),
    )
