"""The learning rate of a run: its warm-up, its plateau, its fall; and how many steps a file takes."""

from __future__ import annotations

import pytest

from qunlearn.config import TrainConfig
from qunlearn.pace import Pace

STEPS = range(1, 101)


def pace(schedule: str, warmup: int = 10) -> Pace:
    return Pace(TrainConfig(steps=100, warmup=warmup, schedule=schedule))


@pytest.mark.parametrize("schedule", ["settle", "linear", "constant"])
def test_the_warm_up_is_a_line(schedule: str) -> None:
    rates = [pace(schedule).rate(step) for step in STEPS]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])


def test_linear_falls_over_all_steps_and_constant_never() -> None:
    linear, constant = pace("linear"), pace("constant")
    assert [linear.rate(step) for step in STEPS][10:] == pytest.approx([(101 - step) / 91 for step in range(11, 101)])
    assert {constant.rate(step) for step in STEPS if step > 10} == {1.0}
    assert pace("linear", warmup=0).rate(1) == pytest.approx(100 / 101)
    for other in (linear, constant):  # what is met changes nothing about them
        before = [other.rate(step) for step in STEPS]
        other.settle(40)
        assert [other.rate(step) for step in STEPS] == before and not other.settled(100)


def test_settle_falls_late_of_itself() -> None:
    rates = [pace("settle").rate(step) for step in STEPS]
    assert set(rates[9:70]) == {1.0}
    assert rates[70:] == pytest.approx([(101 - step) / 31 for step in range(71, 101)])
    assert not pace("settle").settled(100), "a run whose target was not met does not end for having settled"


@pytest.mark.parametrize(("met", "last"), [(20, 40), (40, 60), (60, 90), (69, 100)])  # half as long again, 20 at least
def test_settle_falls_from_where_the_target_was_met(met: int, last: int) -> None:
    p = pace("settle")
    p.settle(met)
    rates = {step: p.rate(step) for step in STEPS}
    assert {rates[step] for step in range(10, met + 1)} == {1.0}
    fall = [(last + 1 - step) / (last + 1 - met) for step in range(met, last + 1)]
    assert [rates[step] for step in range(met, last + 1)] == pytest.approx(fall)
    assert p.rate(last + 1) == p.rate(200) == 0.0
    assert [step for step in range(1, last + 3) if p.settled(step)] == [last, last + 1, last + 2]
    p.settle(met + 5)
    assert {step: p.rate(step) for step in STEPS} == rates, "the first time counts"


def test_a_target_that_is_met_in_the_late_fall_changes_nothing() -> None:
    p = pace("settle")
    before = [p.rate(step) for step in STEPS]
    p.settle(80)
    assert [p.rate(step) for step in STEPS] == before and not p.settled(100)


def test_a_fall_can_be_taken_back_and_begin_again() -> None:
    p = pace("settle")
    p.settle(20)
    p.rise()
    assert p.rate(35) == 1.0 and not p.settled(50)
    p.settle(50)
    assert p.rate(50) == 1.0 and p.rate(60) == pytest.approx(16 / 26)


@pytest.mark.parametrize("schedule", ["settle", "linear", "constant"])
def test_halving_halves_every_rate(schedule: str) -> None:
    p, whole = pace(schedule), pace(schedule)
    p.halve()
    p.halve()
    for step in STEPS:
        assert p.rate(step) == whole.rate(step) / 4 > 0


def test_its_state_comes_back() -> None:
    p, other = pace("settle"), pace("settle")
    p.halve()
    p.settle(30)
    other.load_state(p.state())
    assert [other.rate(step) for step in STEPS] == [p.rate(step) for step in STEPS]
    assert [other.settled(step) for step in STEPS] == [p.settled(step) for step in STEPS]


# -- how many steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        (1, 220),
        (586, 220),  # 220 steps of 8 rows are 1,760 draws
        (587, 221),  # 3 x 587 / 8 = 220.1
        (10_000, 3750),
        (1_000_000, 5000),  # at most
    ],
)
def test_a_large_file_takes_as_many_steps_as_go_through_it(rows: int, steps: int) -> None:
    assert TrainConfig().steps_for(rows) == steps
    assert TrainConfig(steps=7).steps_for(rows) == 7, "asked for, no more and no fewer"


def test_steps_follow_epochs_and_the_batch() -> None:
    assert TrainConfig(epochs=1.0).steps_for(10_000) == 1250
    assert TrainConfig(epochs=1.0, batch_size=4).steps_for(10_000) == 2500
    assert TrainConfig(epochs=0.01).steps_for(10_000) == 220
    assert (TrainConfig().most_steps, TrainConfig(steps=7).most_steps) == (220, 7)
