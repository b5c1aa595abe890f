"""Tests and intervals of an audit: leads, Holm's correction, leak@k, excess recovery.

Everything is seeded: the same outcomes give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qunlearn.evaluation.metrics.stats import Estimate, bootstrap, estimate, percentiles

Outcomes = Sequence[float | None]
ALPHA = 0.05  # chance of any false alarm in a whole audit
MOST_CONTROL_GAIN = 0.2  # share of the gap that an attack may teach the control before it says nothing
LEAST_KEPT = 0.5  # share of its answers that the original must keep under an attack that finds nothing in another


def pairs(units: Sequence[int], *sides: Outcomes) -> list[list[float]]:
    """Return each side's mean outcome of every unit, over the rows that all sides have.

    The wordings of one fact are one unit, for they come back together: counted apart they would pass for evidence
    that is not there (a unit is what is resampled and what a test flips).
    """
    found: list[dict[int, list[float]]] = [{} for _ in sides]
    for unit, *row in zip(units, *sides, strict=True):
        if None not in row:
            for of_unit, value in zip(found, row, strict=True):
                of_unit.setdefault(unit, []).append(value)
    return [[sum(values) / len(values) for values in of_unit.values()] for of_unit in found]


def known(outcomes: Outcomes) -> list[float]:
    """Return the outcomes that are there."""
    return [value for value in outcomes if value is not None]


def share(outcomes: Outcomes) -> Estimate | None:
    """Return the mean with its interval (Wilson's for 0 and 1, else bootstrap); None without any outcome."""
    found = known(outcomes)
    return estimate(found) if found else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): the chance of any false one stays below the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, worst = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = worst
    return out


def leak_at_k(leaks: int, samples: int, k: int) -> float:
    """Return the chance that any of k answers leaks, from `leaks` of so many samples: 1 - C(n - c, k) / C(n, k).

    Unbiased (the estimator of pass@k). Raises ValueError for a k that no sample allows.
    """
    if not 1 <= k <= samples or not 0 <= leaks <= samples:
        raise ValueError("k must be between 1 and the number of samples")
    return 1.0 - math.comb(samples - leaks, k) / math.comb(samples, k)


def leak_curve(counts: Sequence[int], samples: int, units: Sequence[int]) -> dict[int, Estimate]:
    """Return the mean of leak@k over units with its interval, for k = 1, 2, 4 … and all samples."""
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    return {k: estimate(pairs(units, [leak_at_k(c, samples, k) for c in counts])[0]) for k in ks}


def excess_recovery(
    unlearned: tuple[Outcomes, Outcomes], control: tuple[Outcomes, Outcomes], *, seed: int = 0
) -> Estimate | None:
    """Return E = (unlearned after - before) - (control after - before) over the same facts, with its interval.

    A difference in differences: near 0 where the attack taught what it found, above 0 where something was left.
    Facts are resampled as wholes. None where no fact has all four outcomes.
    """
    rows = [
        (ua - ub) - (ca - cb)
        for ub, ua, cb, ca in zip(*unlearned, *control, strict=True)
        if None not in (ub, ua, cb, ca) and ua is not None and ub is not None and ca is not None and cb is not None
    ]
    return _mean_of(rows, 2.0, seed)


def lead_of(unlearned: Sequence[float], control: Sequence[float], *, seed: int = 0) -> Estimate | None:
    """Return the mean of unlearned - control over the same facts, with its interval; None without any fact."""
    return _mean_of([ours - theirs for ours, theirs in zip(unlearned, control, strict=True)], 1.0, seed)


def _mean_of(differences: Sequence[float], most: float, seed: int) -> Estimate | None:
    """Return the mean of differences, none of which can be larger than `most`, with its interval."""
    if not differences:
        return None
    if len(set(differences)) > 1:
        return bootstrap(differences, seed=seed)
    # A bootstrap of equal values has no width, and what was not seen is not impossible: an interval as wide as leaves
    # the unseen a chance of 2.5 % (exact binomial).
    value, n = differences[0], len(differences)
    unseen = 1 - 0.025 ** (1 / n)
    return Estimate(n, value, max(-most, value - unseen), min(most, value + unseen))


def conclusive(control_gain: float, gap: float) -> bool:
    """Return whether an attack says anything: its control gained no more than a fifth of what unlearning took away."""
    return gap > 0 and control_gain <= MOST_CONTROL_GAIN * gap


def auc_difference(
    unlearned: tuple[ArrayLike, ArrayLike], control: tuple[ArrayLike, ArrayLike], *, seed: int = 0, draws: int = 4000
) -> tuple[Estimate, float]:
    """Return AUC(unlearned) - AUC(control) with its interval, and the one-sided p-value that it is not above 0.

    Members and others are resampled, the same rows for both models. Each side is (members, others).
    """
    (a, b), (c, d) = (tuple(np.asarray(x, dtype=np.float64) for x in side) for side in (unlearned, control))
    rng, n, m = np.random.default_rng(seed), len(a), len(b)
    beats = [_beats(a, b), _beats(c, d)]
    value = float(beats[0].mean() - beats[1].mean())
    gap, found = beats[0] - beats[1], np.empty(draws)
    for i in range(draws):
        rows = np.bincount(rng.integers(0, n, n), minlength=n)
        found[i] = rows @ gap @ np.bincount(rng.integers(0, m, m), minlength=m) / (n * m)
    return Estimate(n, value, *percentiles(found)), (1 + int((found <= 0).sum())) / (1 + draws)


def _beats(members: Any, others: Any) -> Any:
    """(n,), (m,) -> (n, m): 1 where a member's score is above another's, a half where they are equal."""
    difference = members[:, None] - others[None, :]
    return (difference > 0) + 0.5 * (difference == 0)


def as_numbers(found: Estimate | None) -> Mapping[str, Any] | None:
    """Return an estimate as JSON holds it."""
    return None if found is None else {"n": found.n, "mean": found.mean, "low": found.low, "high": found.high}
