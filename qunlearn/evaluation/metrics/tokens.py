"""Measures of one row from its teacher-forced tokens. `logps` are natural logarithms of probabilities, (N,)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def floats(values: ArrayLike) -> Floats:
    """Return numbers as an array of float64."""
    return np.asarray(values, dtype=np.float64)


def probability(nll: float, tokens: int) -> float:
    """Probability of the answer per token: exp(-NLL / tokens), the geometric mean of its tokens' probabilities.

    NLL in nats, summed. Source: TOFU (arXiv 2401.06121), "probability". The public code counts the closing token as
    well; here the answer's own tokens count and nothing else.
    """
    return math.exp(-nll / tokens)


def perplexity(nll: float, tokens: int) -> float:
    """Perplexity: exp(NLL / tokens), with NLL in nats summed over the tokens; capped at exp(100)."""
    return math.exp(min(nll / tokens, 100.0))


def exact_memorisation(hits: ArrayLike) -> float:
    """Exact memorisation: share of answer tokens that are the model's first choice after the true text before them.

    Source: Tirumala et al. (arXiv 2205.10770). `hits` (N,) bool; raises ValueError when empty.
    """
    values = np.asarray(hits, dtype=bool)
    if values.size == 0:
        raise ValueError("an answer without tokens cannot be memorised")
    return float(values.mean())


def extraction_strength(hits: ArrayLike, *, floor: bool = False) -> float:
    """Extraction strength: 1 - k / N, with k the shortest true prefix after which every token is the first choice.

    1 when the prompt alone brings the whole answer back, 0 when not even its last token follows from all the
    others. Source: Carlini et al. (arXiv 2012.07805) as used for unlearning. The public code stops at k = N - 1, so
    that a total miss scores 1 / N and short answers look memorised; `floor=True` gives that number.
    """
    values = np.asarray(hits, dtype=bool)
    if values.size == 0:
        raise ValueError("an answer without tokens cannot be extracted")
    misses = np.flatnonzero(~values)
    k = int(misses[-1]) + 1 if misses.size else 0
    if floor:
        k = min(k, values.size - 1)
    return 1.0 - k / values.size


def truth_ratio(correct: float, wrong: Sequence[float], *, arithmetic: bool = False) -> float:
    """Truth ratio R = wrong / correct, both per-token probabilities given as mean NLL; 1 = cannot tell them apart.

    `correct` is the mean NLL (nats per token) of the answer, or of its paraphrase where the data has one; `wrong`
    those of the perturbed answers, averaged geometrically as in the public code, or arithmetically as in the paper.
    Source: TOFU (arXiv 2401.06121). Capped at exp(100).
    """
    if not wrong:
        raise ValueError("a truth ratio needs at least one wrong answer")
    nlls = floats(wrong)
    log_wrong = float(np.logaddexp.reduce(-nlls) - math.log(nlls.size)) if arithmetic else -float(nlls.mean())
    return math.exp(max(-100.0, min(100.0, log_wrong + correct)))


def truth_ratio_forget(ratio: float) -> float:
    """Truth ratio on data to forget: min(R, 1 / R), 1 when true and false are told apart no more.

    It is low both for a model that knows and for one that avoids the truth. Source: TOFU's code.
    """
    return min(ratio, 1.0 / ratio)


def truth_ratio_utility(ratio: float) -> float:
    """Truth ratio on data to keep: max(0, 1 - R), 1 when the truth is far more probable. Source: TOFU's code."""
    return max(0.0, 1.0 - ratio)


def truth_share(ratio: float) -> float:
    """Truth ratio as a share: correct / (correct + wrong) = 1 / (1 + R), 0.5 when both are equally probable.

    The form that tells models with the knowledge from models without it best, and the only one that is monotonic.
    """
    return 1.0 / (1.0 + ratio)


def choice(correct: float, wrong: Sequence[float]) -> float:
    """Multiple choice by text: 1 when the answer's mean NLL is below every wrong one's, shared among ties.

    By chance 1 / (1 + wrong answers). A model that avoids the truth falls below chance.
    """
    best = min(correct, *wrong)
    tied = [correct, *wrong].count(best)
    return 1.0 / tied if correct == best else 0.0
