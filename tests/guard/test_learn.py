"""The threshold's promises, the strength searches, and the measure of separation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qunlearn.errors import DataError, GateError
from qunlearn.evaluation.metrics.logistic import balanced, logistic
from qunlearn.guard.calibrate import Threshold, check_missed, choose_threshold
from qunlearn.guard.learn import fit_tokens
from qunlearn.guard.strength import bracket, zeroth_order


def test_a_rate_lets_so_many_normal_prompts_be_flagged() -> None:
    normal = [i / 1000 for i in range(100)]
    threshold = choose_threshold([0.05] * 10, normal, Threshold(0.05))
    assert sum(p >= threshold for p in normal) <= 5
    between = choose_threshold([0.9] * 10, normal, Threshold(0.05))
    assert 0.099 < between < 0.9
    edge, low, found = (math.log(p / (1 - p)) for p in (threshold, 0.9, between))
    assert found == pytest.approx(edge + (low - edge) / 3), "nearer to prompts that are dressed to look bad"


def test_conformal_holds_its_rate_on_prompts_like_the_held_out_ones() -> None:
    rng, alarms = np.random.default_rng(0), []
    for _ in range(300):
        threshold = choose_threshold([1.0], rng.random(99).tolist(), Threshold(0.05, conformal=True))
        alarms.append((rng.random(200) >= threshold).mean())
    assert np.mean(alarms) < 0.056


def test_conformal_refuses_what_so_few_prompts_cannot_promise() -> None:
    with pytest.raises(DataError, match="99 are needed"):
        choose_threshold([1.0], [0.1] * 98, Threshold(0.01, conformal=True))


def test_a_gate_that_misses_much_is_warned_of_and_one_that_misses_more_is_refused() -> None:
    assert check_missed(5, 100) is None and check_missed(0, 0) is None
    assert (check_missed(25, 100) or "").startswith("the gate misses 25 of 100 ")
    with pytest.raises(GateError, match="misses 26 of 100 held-out prompts"):
        check_missed(26, 100)


def test_bracketing_finds_where_a_score_crosses_its_target() -> None:
    found = bracket(lambda s: 1 / (1 + s), 0.2, 1.0, 1e30)
    assert 4.0 <= found.strength < 4.4 and found.score <= 0.2


def test_bracketing_takes_the_nearest_where_nothing_reaches_the_target() -> None:
    found = bracket(lambda s: 0.5 + 0.1 / s, 0.2, 1.0, 50.0)
    assert found.strength == 50.0 and found.score == pytest.approx(0.502)


def test_zeroth_order_ends_below_its_target() -> None:
    found = zeroth_order(lambda s: 0.9 / (1 + s), 0.1, 1e30)
    assert found.score <= 0.1 and len(found.curve) <= 21


def test_logistic_regression_is_the_minimum_and_its_bound_holds() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 4)), (rng.random(60) < 0.4).astype(float)
    importance, decay = balanced(labels), 0.05
    weights, intercept = logistic(x, labels, importance, decay)
    p = 1 / (1 + np.exp(-(x @ weights + intercept)))
    assert np.abs(x.T @ (importance * (p - labels)) + decay * weights).max() < 1e-4
    assert abs(importance @ (p - labels)) < 1e-4 and importance[labels > 0].sum() == pytest.approx(0.5)
    bound, _ = logistic(x, labels, importance, decay, nonnegative=True)
    assert (weights < 0).any() and (bound >= 0).all()


def test_a_tokens_scorer_finds_the_one_direction_that_betrays_a_text() -> None:
    made = torch.Generator().manual_seed(0)
    texts = [torch.randn(12, 16, generator=made) for _ in range(400)]
    for text in texts[:200]:
        text[5, 3] += 8.0
    scorer = fit_tokens(texts[:150], texts[200:350])
    assert min(map(scorer.text, texts[150:200])) > max(map(scorer.text, texts[350:]))
    assert all(int(scorer.tokens(text).argmax()) == 5 for text in texts[150:200])
