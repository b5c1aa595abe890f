"""The smallest lead that is found four times in five: against the test itself, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qunlearn.attack.power import _least_ups, sign_test_power, smallest_lead, smallest_of_interval
from qunlearn.evaluation.metrics.stats import paired_test

LEVEL = 0.05 / 20
TRIALS = 1500


def found(draw: NDArray[np.float64], level: float = LEVEL) -> float:
    """The share of trials (trials, units) in which the audit's own test finds the lead."""
    return float(np.mean([paired_test(row, np.zeros(len(row))) < level for row in draw]))


@pytest.mark.parametrize(("units", "down"), [(10, 0.0), (40, 0.0), (40, 0.1), (100, 0.05)])
def test_the_smallest_lead_is_found_four_times_in_five(units: int, down: float) -> None:
    """With binary outcomes, and a control that gives some facts by itself: at the lead 80 %, and less below it."""
    seen = [-1.0] * round(down * units) + [0.0] * (units - round(down * units))
    lead = smallest_lead(seen, LEVEL)
    assert lead is not None
    rng = np.random.default_rng(units)
    power = []
    for true in (lead, 0.7 * lead):
        chances = [down, 1 - true - 2 * down, true + down]
        power.append(found(rng.choice([-1.0, 0.0, 1.0], p=chances, size=(TRIALS, units))))
    assert power[0] == pytest.approx(0.8, abs=0.04)
    assert power[1] < 0.7


@pytest.mark.medium
@pytest.mark.parametrize("spread", [pytest.param(0.05, marks=pytest.mark.slow), 0.3])
def test_graded_outcomes_are_approximated(spread: float) -> None:
    """Whole facts that leak, amid outcomes between 0 and 1: some points of power off, and a sparse format promises no
    more than one whose outcomes are 0 and 1."""
    rng = np.random.default_rng(5)
    noise = rng.normal(0.0, spread, size=(400, 40))
    seen = (noise[0] / noise[0].std(ddof=1) * spread).tolist()
    lead = smallest_lead(seen, LEVEL)
    whole = smallest_lead([0.0] * 40, LEVEL)
    assert lead is not None and whole is not None and lead >= whole
    assert found(noise + (rng.random(noise.shape) < lead)) == pytest.approx(0.8, abs=0.1)


def test_too_few_units_could_see_nothing() -> None:
    """Of eight units all must leak for p = 1/256, and no lead can be told from chance below that level."""
    assert smallest_lead([0.0] * 8, 1 / 255) is not None
    assert smallest_lead([0.0] * 8, 1 / 256) is None
    assert smallest_lead([], LEVEL) is None
    assert smallest_lead([-1.0] * 40, LEVEL) is None


def test_more_units_see_less() -> None:
    leads = [smallest_lead([0.0] * n, LEVEL) for n in (10, 20, 40, 80)]
    assert None not in leads and leads == sorted(leads, reverse=True)
    assert leads[2] == pytest.approx(0.27, abs=0.01)  # ten facts in forty, and some room


def test_the_power_is_a_sum_over_all_outcomes() -> None:
    """Against every one of the 3^6 outcomes of six units."""
    level, lead, down = 0.1, 0.5, 0.1
    chances, total = {-1: down, 0: 1 - lead - 2 * down, 1: lead + down}, 0.0
    for outcome in np.ndindex(3, 3, 3, 3, 3, 3):
        d = np.array(outcome, dtype=float) - 1
        if paired_test(d, np.zeros(6)) < level:
            total += float(np.prod([chances[int(x)] for x in d]))
    assert sign_test_power(_least_ups(6, level), lead, down) == pytest.approx(total)


def test_an_interval_tells_its_error() -> None:
    assert smallest_of_interval(-0.196, 0.196, 0.05) == pytest.approx(0.1 * (1.6449 + 0.8416), abs=1e-3)
    assert smallest_of_interval(0.2, 0.2, 0.05) is None
