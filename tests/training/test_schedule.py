"""The learning rate of a run: its warm-up, its plateau, its fall; and how many steps a file takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import call, sets, write_rows

from qunlearn.config.settings import Config
from qunlearn.config.training import TrainConfig
from qunlearn.sandbox import data_file
from qunlearn.training.header import _seen
from qunlearn.training.schedule import Schedule

STEPS = range(1, 101)


def pace(schedule: str, warmup: int = 10) -> Schedule:
    return Schedule(TrainConfig(steps=100, warmup=warmup, schedule=schedule))


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


def late(schedule: str = "settle") -> Schedule:
    return Schedule(TrainConfig(steps=100, more_steps=60, warmup=10, schedule=schedule))


def test_steps_are_added_where_the_fall_would_begin_too_early() -> None:
    p = late()
    p.put_off(70)  # the rate falls behind step 70
    assert p.last == 100 and p.rate(71) == pytest.approx(30 / 31)
    p.put_off(71)
    assert p.last == 160 and {p.rate(step) for step in range(71, 131)} == {1.0}
    assert [p.rate(step) for step in range(131, 161)] == pytest.approx([(161 - step) / 31 for step in range(131, 161)])
    assert list(p.steps(157)) == [158, 159, 160]


@pytest.mark.parametrize(("met", "last"), [(80, 115), (120, 155), (129, 160)])  # 35 of 100 steps at most
def test_what_is_met_late_settles_as_well(met: int, last: int) -> None:
    p = late()
    p.put_off(90)
    p.settle(met)
    assert p.rate(met) == 1.0 and p.rate(last) > 0 == p.rate(last + 1)
    assert p.settled(last) and not p.settled(last - 1)


def test_no_steps_are_added_to_a_fall_or_where_there_are_none() -> None:
    settled, none, linear = late(), pace("settle"), late("linear")
    settled.settle(60)
    for p in (settled, none, linear):
        p.put_off(90)
        assert p.last == 100 and list(p.steps(98)) == [99, 100]


def test_a_late_run_goes_on_late() -> None:
    p, other = late(), late()
    p.put_off(90)
    other.load_state(p.state())
    assert other.last == 160 and other.rate(120) == 1.0


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
    found = TrainConfig().for_rows(rows)
    assert (found.steps, found.more_steps, found.most_steps) == (steps, steps, 2 * steps)
    asked = TrainConfig(steps=7).for_rows(rows)
    assert (asked.steps, asked.most_steps) == (7, 7), "asked for, no more and no fewer"
    assert TrainConfig(steps=7, more_steps=3).for_rows(rows).most_steps == 10


def test_steps_follow_epochs_and_the_batch() -> None:
    assert TrainConfig(epochs=1.0).for_rows(10_000).steps == 1250
    assert TrainConfig(epochs=1.0, batch_size=4).for_rows(10_000).steps == 2500
    assert TrainConfig(epochs=0.01).for_rows(10_000).steps == 220
    assert TrainConfig(more_steps=5).for_rows(1).most_steps == 225
    assert TrainConfig(schedule="linear").for_rows(1).most_steps == 220, "the others have an end of their own"


@pytest.mark.parametrize(
    ("rows", "steps", "said"),
    [
        (10_000, 220, "which see 18 % of them: more --steps see the others"),
        (10_000, 3750, "each seen up to 3 times"),
        (3, 40, "each seen up to 40 times"),  # of fewer rows than a batch has, all are in each
    ],
)
def test_how_often_a_row_is_seen_is_said(rows: int, steps: int, said: str) -> None:
    config = Config(train=TrainConfig(steps=steps))
    assert _seen(config, SimpleNamespace(rows=rows)) == said  # type: ignore[arg-type]


# -- the command -------------------------------------------------------------------------------------------


def first_rows(split: str, n: int) -> list[dict[str, Any]]:
    lines = data_file("hallucination", split).read_text(encoding="utf-8").splitlines()[:n]
    return [json.loads(line) for line in lines]


@pytest.mark.medium
def test_one_bad_row_is_forgotten_and_left_in_peace(tmp_path: Path) -> None:
    """It was pushed for 200 steps more, to a perplexity of 70,000 and an answer that was no sentence."""
    bad = write_rows(tmp_path / "bad.jsonl", first_rows("forget", 1))
    normal = data_file("hallucination", "retain")
    often = {"stop.check_every": 5, "train.warmup": 5, "train.normal_batch_size": 8}
    args = ("--bad", bad, "--normal", normal, "--own-share", 0, "-o", tmp_path / "run", "--device", "cpu", "--json")
    ran = call("forget", "--model", "sandbox", *args, *sets(often))
    assert ran.code == 0, ran.stderr
    assert "at most 220 (or 440, if the target is late) steps of 8 bad rows, each seen up to 220 times" in ran.stderr
    record = ran.json
    assert record["stop_reason"] == "forget target 0.05 met, and the rate has fallen to 0"
    assert record["training"]["steps"] <= 60
    after = record["after"]["forget"]
    assert record["verdicts"]["forgotten"] == 1 and after["sentences"] == 1.0
    assert after["specific_probability"] < 0.05 and after["perplexity"] < 30
    assert record["training"]["best"]["drift"] < 0.01


@pytest.mark.medium
def test_a_large_file_is_gone_through_and_looked_at_throughout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps follow the file; the table is of rows from all over it, and of the same ones the looks begin with."""
    bad = write_rows(tmp_path / "bad.jsonl", first_rows("forget", 40))
    normal = data_file("hallucination", "retain")
    few = {"stop.table_rows": 8, "stop.probe_rows": 8, "train.batch_size": 1, "train.epochs": 7}
    args = ("--bad", bad, "--normal", normal, "--own-share", 0, "--instead", "nothing", "-o", tmp_path / "run")
    seen: dict[str, Any] = {}

    def stop(policy: Any, roles: Any, reference: Any, config: Any, work: Any, watch: Any) -> Any:
        seen.update(roles=roles, config=config, sets=watch.sets)
        raise KeyboardInterrupt

    monkeypatch.setattr("qunlearn.training.forget._train", stop)
    ran = call("forget", "--model", "sandbox", *args, "--device", "cpu", *sets(few))
    assert ran.code != 0
    assert (
        seen["config"].train.steps == 280
        and "at most 280 (or 560, if the target is late) steps of 1 bad rows" in ran.stderr
    )
    lines = [e.record.line for e in seen["sets"]["forget"]]
    assert len(lines) == 8 and lines == sorted(lines) and lines != list(range(1, 9)) and lines[-1] > 20
    assert len(seen["sets"]["normal, held back"]) == 8
