"""The threshold's promises, the strength searches, and the measure of separation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qunlearn.errors import DataError
from qunlearn.guard.gate import pool
from qunlearn.guard.learn import Threshold, auc, choose_threshold
from qunlearn.guard.strength import bracket, zeroth_order


def test_auc_counts_pairs() -> None:
    bad, normal = np.array([0.9, 0.5, 0.7]), np.array([0.5, 0.1, 0.8, 0.2])
    pairs = [(b > n) + 0.5 * (b == n) for b in bad for n in normal]
    assert auc(bad, normal) == pytest.approx(sum(pairs) / len(pairs))


def test_a_rate_lets_so_many_normal_prompts_be_flagged() -> None:
    normal = [i / 1000 for i in range(100)]
    threshold = choose_threshold([0.05] * 10, normal, Threshold(0.05))
    assert sum(p >= threshold for p in normal) <= 5
    assert 0.099 < choose_threshold([0.9] * 10, normal, Threshold(0.05)) < 0.9


def test_conformal_holds_its_rate_on_prompts_like_the_held_out_ones() -> None:
    rng, alarms = np.random.default_rng(0), []
    for _ in range(300):
        threshold = choose_threshold([1.0], rng.random(99).tolist(), Threshold(0.05, conformal=True))
        alarms.append((rng.random(200) >= threshold).mean())
    assert np.mean(alarms) < 0.056


def test_conformal_refuses_what_so_few_prompts_cannot_promise() -> None:
    with pytest.raises(DataError, match="99 are needed"):
        choose_threshold([1.0], [0.1] * 98, Threshold(0.01, conformal=True))


def test_pooling_is_at_least_the_maximum_and_blind_to_padding() -> None:
    scores, mask = torch.tensor([[1.0, -3.0, 99.0]]), torch.tensor([[True, True, False]])
    assert 1.0 <= float(pool(scores, mask)) < 1.2


def test_bracketing_finds_where_a_score_crosses_its_target() -> None:
    found = bracket(lambda s: 1 / (1 + s), 0.2, 1.0, 1e30)
    assert 4.0 <= found.strength < 4.4 and found.score <= 0.2


def test_bracketing_takes_the_nearest_where_nothing_reaches_the_target() -> None:
    found = bracket(lambda s: 0.5 + 0.1 / s, 0.2, 1.0, 50.0)
    assert found.strength == 50.0 and found.score == pytest.approx(0.502)


def test_zeroth_order_ends_below_its_target() -> None:
    found = zeroth_order(lambda s: 0.9 / (1 + s), 0.1, 1e30)
    assert found.score <= 0.1 and len(found.curve) <= 21
