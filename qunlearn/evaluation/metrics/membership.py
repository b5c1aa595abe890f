"""Membership scores of a row, higher for what looks trained on, and of two sets of rows: AUC with interval, privacy
leakage. `logps` are natural logarithms of probabilities, (N,); NLLs are in nats, summed over the tokens."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qunlearn.evaluation.metrics.stats import REPLICATES, Estimate, percentiles
from qunlearn.evaluation.metrics.tokens import floats

MIN_K = 0.4
_TINY_VARIANCE = 1e-6
_CHUNK_NUMBERS = 1 << 21


def loss_score(nll: float, tokens: int) -> float:
    """Loss attack: mean log-probability per token (Yeom et al., arXiv 1709.01604)."""
    return -nll / tokens


def zlib_bytes(text: str) -> int:
    """Length of the text after zlib compression, in bytes."""
    return len(zlib.compress(text.encode("utf-8")))


def zlib_score(nll: float, compressed: int) -> float:
    """Zlib attack: log-probability of the whole text per byte of its zlib compression.

    Source: Carlini et al. (arXiv 2012.07805). The public code divides the mean per token by the bytes of the whole
    text, which makes long texts look like members.
    """
    return -nll / compressed


def min_k_score(logps: ArrayLike, share: float = MIN_K) -> float:
    """Min-K attack: mean log-probability of the least probable tokens, a `share` of all, at least one.

    Source: Shi et al. (arXiv 2310.16789); 40 % as in the public unlearning benchmarks.
    """
    values = np.sort(floats(logps))
    return float(values[: max(1, int(values.size * share))].mean())


def min_k_plus_score(logps: ArrayLike, means: ArrayLike, stds: ArrayLike, share: float = MIN_K) -> float:
    """Min-K++ attack: Min-K over (log p - mean) / std, mean and std of log p under the model's own distribution.

    Source: Zhang et al. (arXiv 2404.02936). The variance is kept above 1e-6, as in the public code.
    """
    spread = np.sqrt(np.maximum(np.square(floats(stds)), _TINY_VARIANCE))
    return min_k_score((floats(logps) - floats(means)) / spread, share)


def reference_score(nll: float, reference_nll: float, tokens: int) -> float:
    """Reference attack: how much more probable the text is here than under a model that never saw it.

    In nats per token: (NLL of the reference - NLL) / tokens. Source: Carlini et al. (arXiv 2112.03570).
    """
    return (reference_nll - nll) / tokens


# -- of two sets of rows -----------------------------------------------------------------------------------


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Area under the ROC curve: P(score of a member > score of another) + half of P(equal).

    Scores are higher for what looks trained on, so 1 = the forget rows look like members, 0.5 = no difference.
    Ties count one half. Raises ValueError when a side is empty.
    """
    a, b = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if a.size == 0 or b.size == 0:
        raise ValueError("an AUC needs rows on both sides")
    ordered = np.sort(b)
    below, upto = np.searchsorted(ordered, a, "left"), np.searchsorted(ordered, a, "right")
    return float((below + upto).mean() / (2 * b.size))


def auc_estimate(members: ArrayLike, others: ArrayLike, *, seed: int = 0) -> Estimate:
    """AUC with its 95 % bootstrap interval, members and others resampled apart. `n` counts the members."""
    a, b = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    value = auc(a, b)
    if a.size == 1 or b.size == 1:
        return Estimate(a.size, value)
    # Rows enter only through the place of their value among all: counts per distinct value are enough.
    distinct, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    rng = np.random.default_rng(seed)
    block = max(1, _CHUNK_NUMBERS // (a.size + b.size))
    parts = []
    for done in range(0, REPLICATES, block):
        rows = min(block, REPLICATES - done)
        x = _counts(places[: a.size], rows, distinct.size, rng)
        y = _counts(places[a.size :], rows, distinct.size, rng)
        below = np.cumsum(y, axis=1) - y
        parts.append(((below + 0.5 * y) * x).sum(axis=1) / (a.size * b.size))
    return Estimate(a.size, value, *percentiles(np.concatenate(parts)))


def _counts(places: NDArray[np.int64], rows: int, distinct: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each distinct value is drawn, (rows, distinct), in `rows` resamples of one side."""
    drawn = places[rng.integers(0, places.size, size=(rows, places.size))]
    flat = drawn + distinct * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * distinct).reshape(rows, distinct)


def privacy_leakage(auc_model: float, auc_retrained: float = 0.5) -> float:
    """Privacy leakage in %: 100 * ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref); 0 is ideal.

    Below 0 the forget rows still look trained on (under-unlearned), above 0 less so than rows never seen
    (over-unlearned, which gives them away as well). The retrained model never saw them; without one, 0.5.
    Source: MUSE (arXiv 2407.06460). Raises ValueError for a retrained AUC of 1, against which nothing can be measured.
    """
    if auc_retrained >= 1.0:
        raise ValueError("a retrained model cannot take every forget row for a member")
    return 100.0 * ((1.0 - auc_model) - (1.0 - auc_retrained)) / (1.0 - auc_retrained)
