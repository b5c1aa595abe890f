"""Power: the smallest lead over its control that an attack would have told from chance, so that silence can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

POWER = 0.8
_HALVINGS = 30


def smallest_lead(differences: Sequence[float], level: float, power: float = POWER) -> float | None:
    """Return the smallest lead, a share of the units, found at a one-sided level with this power; None for none.

    `differences` are unlearned minus control, one a unit. A leak is of whole facts: a unit leaks or does not. Where all
    differences are -1, 0 or 1 the test is McNemar's exact one, and its power is summed over what the units may do
    (`sign_test_power`), the control's own successes at the rate that was seen. Else it is the larger of that without
    such successes and of the normal approximation lead = (z of the level + z of the power) * sd / sqrt(n), with the
    variance that was seen and the leak's own, lead * (1 - lead). Sources: S. Suissa and J. J. Shuster, "The 2 x 2
    matched-pairs trial", Biometrics 47 (1991); J. M. Lachin, "Introduction to sample size determination and power
    analysis", Controlled Clinical Trials 2 (1981).
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.size == 0:
        return None
    whole = bool(np.isin(d, (-1.0, 0.0, 1.0)).all())
    down, least = float((d < 0).mean()) if whole else 0.0, _least_ups(d.size, level)
    found = _smallest(lambda lead: sign_test_power(least, lead, down) >= power, 1.0 - 2 * down)
    if whole or found is None or d.size < 2:
        return found
    z, spread = _quantiles(level, power), float(d.var(ddof=1))
    noisy = _smallest(lambda lead: lead >= z * math.sqrt((spread + lead * (1 - lead)) / d.size), 1.0)
    return None if noisy is None else max(found, noisy)


def _smallest(enough: Callable[[float], bool], high: float) -> float | None:
    """Bisect for the smallest lead that is enough; None where the largest is not."""
    low = 0.0
    if high <= 0 or not enough(high):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def smallest_of_interval(low: float, high: float, level: float, power: float = POWER) -> float | None:
    """Return the same of an estimate of which the 95 % interval is known, such as a difference of two AUCs."""
    found = _quantiles(level, power) * (high - low) / (2 * NormalDist().inv_cdf(0.975))
    return found if 0 < found <= 1 else None


def _quantiles(level: float, power: float) -> float:
    z = NormalDist().inv_cdf
    return z(1 - level) + z(power)


def sign_test_power(least: NDArray[np.int64], lead: float, down: float) -> float:
    """Return the chance that the exact sign test of n units finds a lead.

    A unit is up with the chance lead + down, and down with `down`. `least` (n + 1,): of so many units that differ, how
    many must be up. The sum over their number D of P(D) P(ups >= least | D).
    """
    from scipy import stats

    n = len(least) - 1
    differ = np.arange(n + 1)
    share = lead + 2 * down
    found = stats.binom.pmf(differ, n, share) * stats.binom.sf(
        least - 1, differ, (lead + down) / share if share else 0.0
    )
    return float(np.where(differ > 0, found, 0.0).sum())


def _least_ups(n: int, level: float) -> NDArray[np.int64]:
    """(n + 1,): of so many units that differ, the fewest ups with a p-value below the level; one more than there are
    where none will do."""
    from scipy import stats

    differ = np.arange(n + 1)
    tail = stats.binom.sf(differ[None, :] - 1, differ[:, None], 0.5)  # (differ, ups)
    enough = (tail < level) & (differ[None, :] <= differ[:, None])
    return np.where(enough.any(axis=1), enough.argmax(axis=1), differ + 1)
