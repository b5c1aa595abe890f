"""Tests and intervals of an audit against independent definitions, and their coverage by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from qunlearn.attack.statistics import auc_difference, conclusive, excess_recovery, holm, lead_of, leak_at_k, pairs
from qunlearn.attack.weights import nearest
from qunlearn.evaluation.metrics.membership import auc
from qunlearn.evaluation.metrics.stats import paired_test


def test_paired_test_is_mcnemars_where_outcomes_are_binary() -> None:
    a, b = [1.0] * 9 + [0.0] * 3 + [1.0] * 8, [0.0] * 9 + [1.0] * 3 + [1.0] * 8
    assert paired_test(a, b) == pytest.approx(stats.binomtest(9, 12, alternative="greater").pvalue)
    assert paired_test(b, b) == 1.0


def test_paired_test_is_the_randomisation_test_otherwise() -> None:
    d = np.array([0.5, 0.25, 0.75, -0.25, 1.0, 0.3])
    exact = np.mean([np.dot(s, np.abs(d)) >= d.sum() - 1e-12 for s in itertools.product((-1, 1), repeat=d.size)])
    assert paired_test(d, np.zeros(d.size)) == pytest.approx(float(exact), abs=0.01)


def test_holm_by_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_leak_at_k_is_the_share_of_draws_with_a_leak() -> None:
    samples = [1, 0, 0, 1, 0]
    for k in (1, 2, 3, 4, 5):
        drawn = list(itertools.combinations(samples, k))
        assert leak_at_k(2, 5, k) == pytest.approx(sum(any(d) for d in drawn) / len(drawn))
    with pytest.raises(ValueError, match="between 1"):
        leak_at_k(1, 5, 6)


def test_excess_is_the_difference_in_differences() -> None:
    before, after, control = [0.0, 0.0, 1.0, None], [1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]
    found = excess_recovery((before, after), ([0.0] * 4, control))
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx(np.mean([1.0, -1.0, 0.0]))
    assert excess_recovery(([None], [1.0]), ([0.0], [0.0])) is None


def test_a_lead_is_between_minus_one_and_one() -> None:
    for value in (1.0, -1.0, 0.0):
        found = lead_of([max(value, 0.0)] * 4, [max(-value, 0.0)] * 4)
        assert found is not None and found.low is not None and found.high is not None
        assert -1.0 <= found.low <= found.mean == value <= found.high <= 1.0 and found.low < found.high
    assert lead_of([], []) is None


@pytest.mark.parametrize("facts", [60, 18])
def test_excess_intervals_cover_the_truth(facts: int) -> None:
    """Of 200 audits with an excess of 0.3, at least nine intervals in ten hold it; also of half of few facts."""
    rng, hits = np.random.default_rng(3), 0
    for trial in range(200):
        ours, theirs = (rng.random(facts) < 0.5).astype(float), (rng.random(facts) < 0.2).astype(float)
        zeros = [0.0] * facts
        found = excess_recovery((zeros, ours.tolist()), (zeros, theirs.tolist()), seed=trial)
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= 0.3 <= found.high
    assert hits >= 180


def test_an_attack_that_teaches_its_control_is_inconclusive() -> None:
    assert conclusive(0.2, 1.0)
    assert not conclusive(0.21, 1.0)
    assert not conclusive(0.0, 0.0)


def test_auc_difference_is_that_of_two_aucs() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(2, 1, 40), rng.normal(0, 1, 40), rng.normal(0, 1, 40)
    found, p = auc_difference((a, b), (c, b))
    assert found.mean == pytest.approx(auc(a, b) - auc(c, b))
    assert p < 0.01
    assert auc_difference((c, b), (c, b))[1] == 1.0


def test_auc_differences_are_covered_and_raise_few_alarms() -> None:
    """Of 200 audits the interval holds the true difference in nine of ten; of as many without one, p is below 0.05 in
    no more than one in ten (the test is an approximation: in one of twenty, were it exact)."""
    rng, hits, alarms = np.random.default_rng(4), 0, 0
    truth = stats.norm.cdf(1 / np.sqrt(2)) - 0.5  # members that lie 1 above the others, and that do not
    for trial in range(200):
        others, ours, theirs = rng.normal(0, 1, 40), rng.normal(1, 1, 40), rng.normal(0, 1, 40)
        found, _ = auc_difference((ours, others), (theirs, others), seed=trial, draws=800)
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
        _, p = auc_difference((ours, others), (rng.normal(1, 1, 40), others), seed=trial, draws=800)
        alarms += p < 0.05
    assert hits >= 180 and alarms <= 20


def test_round_to_nearest_by_its_definition() -> None:
    """Against loops in float64; a short last group, and a group of zeros."""
    import torch

    weight = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[1, :4] = 0
    found = nearest(weight, 7, 4)
    for row in range(3):
        for start in range(0, 10, 4):
            group = weight[row, start : start + 4].numpy()
            scale = max(np.abs(group).max() / 7, 1e-12 / 7)
            assert found[row, start : start + 4].numpy() == pytest.approx(np.round(group / scale) * scale, abs=1e-5)


def test_wordings_of_a_fact_count_once() -> None:
    """Means of each unit over the rows that both sides have, and no smaller p-value for the same rows given twice."""
    assert pairs([0, 0, 1, 2], [1.0, 0.0, 1.0, None], [0.0, 0.0, 1.0, 1.0]) == [[0.5, 1.0], [0.0, 1.0]]
    ours, theirs = [1.0] * 4 + [0.0] * 4, [0.0] * 8
    once = paired_test(*pairs(range(8), ours, theirs))
    assert paired_test(*pairs([*range(8), *range(8)], ours * 2, theirs * 2)) == once
    assert paired_test(ours * 2, theirs * 2) < once
