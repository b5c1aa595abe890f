"""Uncertainty and comparison: bootstrap and Wilson intervals, paired differences, tests, harmonic mean.

Every interval is seeded: the same values give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
REPLICATES = 2000
LEVEL = 0.95
_FLIPS, _FLIPS_AT_ONCE = 1 << 15, 1 << 10
_CHUNK_NUMBERS = 1 << 21  # of a block of replicates: memory that does not grow with the data


@dataclass(frozen=True)
class Estimate:
    """A value from `n` rows with its 95 % interval; `low` and `high` are None where there is none."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None


def estimate(values: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of rows with its interval: bootstrap, or Wilson's where every value is 0 or 1.

    The bootstrap of forty zeros is [0, 0]: it says that what was not seen cannot happen. Wilson's interval for a
    share does not.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no values to estimate from")
    if np.isin(x, (0.0, 1.0)).all():
        return wilson(int(x.sum()), x.size)
    return bootstrap(x, seed=seed)


def bootstrap(values: ArrayLike, *, seed: int = 0, replicates: int = REPLICATES) -> Estimate:
    """Mean with its percentile bootstrap interval over rows (Efron). With one row there is no interval."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no values to estimate from")
    if x.size == 1:
        return Estimate(1, float(x[0]))
    means = np.concatenate([x[rows].mean(axis=1) for rows in _resamples(x.size, seed, replicates)])
    return Estimate(x.size, float(x.mean()), *percentiles(means))


def bootstrap_perplexity(nlls: ArrayLike, tokens: ArrayLike, *, seed: int = 0) -> Estimate:
    """exp(sum of NLL / sum of tokens) over rows, with its interval from resampled rows; capped at exp(100)."""
    a, b = np.asarray(nlls, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    value = float(np.exp(min(a.sum() / b.sum(), 100.0)))
    if a.size == 1:
        return Estimate(1, value)
    parts = [a[rows].sum(axis=1) / b[rows].sum(axis=1) for rows in _resamples(a.size, seed, REPLICATES)]
    return Estimate(a.size, value, *percentiles(np.exp(np.minimum(np.concatenate(parts), 100.0))))


def wilson(successes: int, n: int) -> Estimate:
    """A share with Wilson's score interval (1927): sensible at 0 and at 1, and for few rows."""
    if n == 0:
        raise ValueError("no values to estimate from")
    z = 1.959963984540054  # the normal's 97.5 % point
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(n, share, low, high)


def paired_difference(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of second - first over the same rows, with its bootstrap interval: rows are resampled as pairs."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pairs need as many values on each side, not {a.size} and {b.size}")
    return bootstrap(b - a, seed=seed)


def paired_test(higher: ArrayLike, lower: ArrayLike, *, seed: int = 0) -> float:
    """Return the one-sided p-value that the first values are no higher than the second ones of the same rows.

    Signs of the differences are flipped: exactly where all differences are as large (McNemar's exact test), else in
    32,768 draws (Fisher's randomisation test). 1 where no row differs.
    """
    from scipy import stats

    d = np.asarray(higher, dtype=np.float64) - np.asarray(lower, dtype=np.float64)
    d = d[d != 0]
    if d.size == 0:
        return 1.0
    sizes = np.abs(d)
    if np.allclose(sizes, sizes[0]):
        return float(stats.binom.sf(int((d > 0).sum()) - 1, d.size, 0.5))
    rng, total, above = np.random.default_rng(seed), d.sum(), 0
    for _ in range(_FLIPS // _FLIPS_AT_ONCE):
        flipped = (rng.integers(0, 2, size=(_FLIPS_AT_ONCE, d.size)) * 2 - 1) @ sizes
        above += int((flipped >= total - 1e-12).sum())
    return (1 + above) / (1 + _FLIPS)


def unpaired_difference(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of second - mean of first over different rows, each side resampled by itself. `n` is the smaller side."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size == 0 or b.size == 0:
        raise ValueError("a difference needs rows on both sides")
    value = float(b.mean() - a.mean())
    if min(a.size, b.size) == 1:
        return Estimate(1, value)
    sides = [
        np.concatenate([x[rows].mean(axis=1) for rows in _resamples(x.size, seed + i, REPLICATES)])
        for i, x in enumerate((a, b))
    ]
    return Estimate(min(a.size, b.size), value, *percentiles(sides[1] - sides[0]))


def two_samples(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """Kolmogorov-Smirnov statistic D and two-sided p-value of two samples (scipy's ks_2samp)."""
    from scipy import stats

    found = stats.ks_2samp(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    return float(found.statistic), float(found.pvalue)


def forget_quality(ratios: ArrayLike, retrained: ArrayLike) -> float:
    """Forget quality: p-value that the truth ratios here and under a model that never saw the data are alike.

    Two-sample Kolmogorov-Smirnov test over the rows to forget; near 1 is good, below 0.05 the two differ. A p-value
    falls with the number of rows, whatever the distance: read the truth-ratio distance beside it. Source: TOFU
    (arXiv 2401.06121).
    """
    return two_samples(ratios, retrained)[1]


def truth_distance(ratios: ArrayLike, retrained: ArrayLike) -> float:
    """Truth-ratio distance: the KS statistic D of the same test, from 0 (same distribution) to 1 (no overlap)."""
    return two_samples(ratios, retrained)[0]


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean; 0 where any value is 0, for one lost ability is a lost model."""
    if not values:
        raise ValueError("no values to combine")
    if any(value < 0 for value in values):
        raise ValueError("a harmonic mean needs values of at least 0")
    return 0.0 if min(values) == 0 else len(values) / sum(1.0 / value for value in values)


def percentiles(replicates: Floats) -> tuple[float, float]:
    """The middle 95 % of bootstrap replicates."""
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resamples(n: int, seed: int, replicates: int) -> Iterator[NDArray[np.int64]]:
    """Blocks (R, n) of row numbers drawn with replacement, `replicates` in all."""
    rng = np.random.default_rng(seed)
    block = max(1, _CHUNK_NUMBERS // n)
    for done in range(0, replicates, block):
        yield rng.integers(0, n, size=(min(block, replicates - done), n))
