"""Compare membership scores of two sets of rows: AUC with interval, privacy leakage."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qunlearn.evaluation.metrics.stats import REPLICATES, Estimate, percentiles

_CHUNK_NUMBERS = 1 << 21


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
