"""Which tokens of a passage are pushed, by what the model makes of each with its context and without."""

from __future__ import annotations

import math

from qunlearn.roles.context_tokens import Scored


def scored(*parts: tuple[int, float], loss: float = 5.0) -> Scored:
    """An answer of parts: so many tokens of such a probability."""
    full = [math.log(p) for count, p in parts for _ in range(count)]
    return Scored(tuple(full), (loss,) * len(full), (False,) * len(full))


def test_of_a_text_that_is_known_in_part_only_that_part_is_pushed() -> None:
    """What the model does not say would make what it recites look forgotten."""
    weights = scored((40, 0.99), (80, 1e-4)).weights()
    assert all(weights[:40]) and sum(weights[40:]) <= 1, "a token beside it is in a run that is recited all the same"
    weights = scored((30, 1e-4), (20, 0.9), (30, 1e-3)).weights()
    assert all(weights[30:50]) and sum(weights) <= 22


def test_a_slip_within_a_recited_part_is_pushed_with_it() -> None:
    assert all(scored((20, 0.99), (1, 0.02), (20, 0.99)).weights())


def test_where_nothing_is_recited_every_token_counts() -> None:
    for parts in ([(60, 1e-4)], [(10, 0.99), (10, 1e-4), (10, 0.99)], [(40, 0.38)], [(50, 0.9)]):
        assert all(scored(*parts).weights())


def test_the_least_share_is_of_what_is_said() -> None:
    """Tokens that the last few tell are taken where nothing else is, but none that the model does not know."""
    weights = scored((40, 0.99), (80, 1e-4), loss=0.5).weights()
    assert sum(weights[:41]) == sum(weights) == round(0.15 * 40)
