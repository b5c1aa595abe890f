"""What the loop decides at its looks: which adapter is kept, when it pushes harder, goes back, settles, and ends."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config
from qunlearn.config.training import StopConfig, TrainConfig
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.evaluation.metrics import LEAKS
from qunlearn.model.policy import Policy
from qunlearn.objectives.control import make_controller
from qunlearn.roles.mismatch import NO_MISMATCH
from qunlearn.roles.roles import Reserved, Roles
from qunlearn.training import loop, stopping
from qunlearn.training.gradients import Gradients
from qunlearn.training.outcome import Outcome, Probe
from qunlearn.training.schedule import Schedule

MakePolicy = Callable[..., Policy]
Look = tuple[float, ...]  # p(bad), drift, and where it is told the share of rows not clearly below the target
STOP = StopConfig(target=0.05, max_drift=0.1, patience=3)


def log_odds(p: float) -> float:
    return math.log(p) - math.log(1 - p)


def look(step: int, p: float, drift: float, shallow: float = 0.0, stop: StopConfig = STOP) -> Probe:
    """A look that found every bad row at p."""
    return Probe(step, p, drift, float(p > stop.target), log_odds(p) - log_odds(stop.target), shallow)


# -- the adapter that is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Probe(1, 0.9, 0.05, 0.9), Probe(2, 0.01, 0.2, 0.0)),  # within the budget comes first
        (Probe(1, 0.3, 0.09, 0.2), Probe(2, 0.2, 0.01, 0.4)),  # then how many rows are forgotten
        (Probe(1, 0.2, 0.09, 0.4), Probe(2, 0.3, 0.01, 0.4)),  # then how far the others are
        (Probe(1, 0.2, 0.09), Probe(2, 0.4, 0.01)),  # where rows were not looked at, by the mean
        (Probe(1, 0.04, 0.02), Probe(2, 0.001, 0.03)),  # below the target only drift counts
        (Probe(1, 0.04, 0.02, 0.01), Probe(2, 0.001, 0.03, 0.0)),  # a row in a hundred may be above it
        (Probe(1, 0.01, 0.03, 0.0, 0.0, 0.01), Probe(2, 0.04, 0.02, 0.0, 0.0, 0.5)),  # and not by a hair
        (Probe(1, 0.04, 0.02, 0.0, 0.0, 0.5), Probe(2, 0.02, 0.03, 0.0, 0.0, 0.4)),  # or both are
        (Probe(2, 0.3, 0.05, 0.2, again=3), Probe(1, 0.01, 0.01, 0.0)),  # what was looked at in fewer words says less
        (Probe(1, 0.01, 0.01, 0.0), Probe(2, 0.01, 0.2, 0.0, again=3)),  # but for the budget
    ],
)
def test_rank(better: Probe, worse: Probe) -> None:
    assert better.rank(STOP) < worse.rank(STOP)


def test_the_target_is_met_by_rows_not_by_their_mean() -> None:
    """Four rows that are known by heart among a hundred that are not have a mean below any target."""
    assert not Probe(1, 0.0395, 0.0, 0.04).met(STOP)
    assert Probe(1, 0.0395, 0.0, 0.01).met(STOP)
    assert Probe(1, 0.0395, 0.0, 0.04).met(replace(STOP, rows_left=0.04))
    assert not Probe(1, 0.0395, 0.11, 0.0).met(STOP)  # nor where the drift is over the budget


@pytest.mark.parametrize(
    ("looks", "kept"),
    [
        ([(0.04, 0.030), (0.01, 0.036)], 2),  # no worse than noise tells, and later
        ([(0.04, 0.030), (0.01, 0.038)], 1),
        ([(0.04, 0.030), (0.04, 0.037), (0.04, 0.045)], 2),  # against the least, not the last that was kept
        ([(0.04, 0.030), (0.06, 0.030)], 1),  # above the target
        ([(0.04, 0.030), (0.04, math.nan)], 1),
        ([(0.40, 0.030), (0.04, 0.090)], 2),
        ([(0.40, 0.090), (0.04, 0.110)], 1),  # over the budget
        ([(0.40, 0.030), (0.41, 0.030)], 1),  # not there yet: what is forgotten decides
        ([(0.899, 0.001), (0.86, 0.001)], 0),  # 5 % of the way to the target are 0.0425: less is noise
        ([(0.899, 0.001), (0.85, 0.001)], 2),
        ([(0.80, 0.110), (0.85, 0.001)], 2),
    ],
)
def test_which_look_is_kept(looks: list[Look], kept: int) -> None:
    """The best; of those as good as can be told the later; the untouched model where nothing has clearly moved."""
    probes = [look(i, *found) for i, found in enumerate([(0.9, 0.0), *looks])]
    outcome = Outcome({}, probes[0], probes=probes[:1])
    for probe in probes[1:]:
        stopping.consider(outcome, probe, SimpleNamespace(adapter_state=dict), STOP)  # type: ignore[arg-type]
    assert outcome.best.step == kept


def test_fewer_rows_above_the_target_are_a_move_though_the_mean_hardly_falls() -> None:
    """Four rows of a hundred are known: all four forgotten, the mean has fallen from .0395 to .0005."""
    first, last = Probe(0, 0.0395, 0.0, 0.04), Probe(20, 0.0005, 0.001, 0.0)
    outcome = Outcome({}, first, probes=[first])
    stopping.consider(outcome, last, SimpleNamespace(adapter_state=dict), STOP)  # type: ignore[arg-type]
    assert outcome.best is last


# -- the loop, with looks and gradients that are made up ---------------------------------------------------


@dataclasses.dataclass
class Driven:
    """What a run of the loop did. `states`: the adapter at the end of each step, by step."""

    outcome: Outcome
    events: dict[int, dict[str, Any]]
    states: dict[int, dict[str, torch.Tensor]]
    rule: Any

    def moved(self, step: int) -> float:
        """The largest change of any number of the adapter in a step."""
        a, b = self.states[step - 1], self.states[step]
        return max(float((a[name] - b[name]).abs().max()) for name in a)

    def said(self, word: str) -> dict[int, Any]:
        return {step: event[word] for step, event in self.events.items() if word in event}


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy) -> Callable[..., Driven]:
    """Run the loop with a look every two steps, as given (the last one goes on for ever), and random gradients."""

    def run(
        looks: Sequence[Look],
        rows: int = 2,
        taught: Sequence[float] = (),
        reserve: int = 0,
        back: Sequence[set[int]] = (),
        budget: float | None = None,
        **train: Any,
    ) -> Driven:
        policy = new_policy("none", r=1, target_modules="q_proj")
        example = Example((5, 6, 7, 8), 2, 4, 2, Record((), "x", 0, {}))
        wordings = [Example((5, 6, 7, n), 2, 4, 2, example.record) for n in range(reserve)]
        reserved = [Reserved(rows + n, 0, wording) for n, wording in enumerate(wordings)]
        forget, starts = [*[example] * rows, *wordings], [(i,) for i in range(rows)]
        roles = Roles(forget, [example] * 2, [example], NO_MISMATCH, starts=starts, reserve=reserved)
        usual = TrainConfig(steps=40, warmup=0, lr=1e-3, batch_size=2, normal_batch_size=1)
        config = Config(train=replace(usual, **train), stop=replace(STOP, check_every=2))
        config = replace(config, objective=replace(config.objective, retain_budget=budget))
        generator, events, states, rules = torch.Generator().manual_seed(0), {}, {}, []
        given, losses, asked = iter(looks), iter(taught), iter(back)
        last = [looks[0]]

        def probed(_p: object, _r: object, _ref: object, _c: object, step: int, come_back: Collection[int]) -> Probe:
            last[0] = next(given, last[0])
            return replace(look(step, *last[0]), again=len(come_back))

        def scored(_p: object, rows: Sequence[Example], _limit: int) -> list[SimpleNamespace]:
            """Whether each wording comes back, which its last token tells."""
            leaking = next(asked, set())
            return [SimpleNamespace(verdict=LEAKS if row.input_ids[-1] in leaking else "forgotten") for row in rows]

        def backward(budget: Any, *_: object, **__: object) -> Gradients:
            for p in budget.policy.trainable().values():
                p.grad = torch.randn(p.shape, generator=generator)
            return Gradients({"kl": 0.01, **({"taught": next(losses)} if taught else {})}, 1)

        class Watched(stopping.EarlyStopping):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                rules.append(self)

        def observe(event: Any) -> None:
            events[event["step"]], states[event["step"]] = dict(event), policy.adapter_state()

        monkeypatch.setattr(stopping, "look", probed)
        monkeypatch.setattr(stopping, "score_rows", scored)
        monkeypatch.setattr(loop.MicroBatcher, "backward", backward)
        return Driven(loop.train(policy, roles, None, config, observe, stopping=Watched), events, states, rules[0])  # type: ignore[arg-type]

    return run


OVER = 0.3  # a drift over the budget


def test_drift_over_the_budget_at_two_looks_goes_back(drive: Callable[..., Driven]) -> None:
    """To the best adapter, with half the rate, a fresh optimizer and twice the retain weight."""
    run = drive([(0.9, 0), (0.85, 0.05), (0.2, OVER), (0.1, OVER), (0.3, 0.06)], steps=10, schedule="constant")
    assert run.said("back_to") == {6: 2}
    assert run.states[6].keys() == run.states[2].keys()
    assert all(torch.equal(run.states[6][name], t) for name, t in run.states[2].items())
    assert not all(torch.equal(run.states[5][name], t) for name, t in run.states[2].items())
    # Adam's first step moves every number by the rate, whatever the gradient; with momentum left from before, or at
    # the old rate, it would not.
    assert run.moved(1) == pytest.approx(1e-3, rel=1e-3)
    assert run.moved(7) == pytest.approx(0.5e-3, rel=1e-3)
    retain = [run.events[step]["multipliers"]["retain"] for step in range(1, 11)]
    assert retain == [1.0] * 6 + [2.0] * 4
    forget = [run.events[step]["multipliers"]["forget"] for step in range(1, 11)]
    assert forget == [1.0] * 2 + [3.0] * 4 + [1.0] * 4  # it was pushed, which is taken back
    assert run.outcome.returns == 1


def test_what_is_given_up_says_nothing_of_the_adapter_that_is_gone_back_to(drive: Callable[..., Driven]) -> None:
    """Neither that its first look is the second one over the budget, nor how fast it forgets."""
    looks = [(0.9, 0), (0.85, 0.05), (0.2, OVER), (0.1, OVER), (0.3, 0.28)]
    again = drive(looks, steps=14, schedule="constant")
    assert again.said("back_to") == {6: 2, 10: 2, 14: 2}
    # In the log odds 4.7 were left, and 3.8 are two steps later: as fast as is needed, and no rise from the 0.7 that
    # were left to what is given up.
    on_the_way = drive([*looks[:4], (0.7, 0.04)], schedule="constant", steps=40)
    assert [on_the_way.events[step]["multipliers"]["forget"] for step in (7, 9)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("forget", "drift", "left", "pushed"), [(0.0395, 0.01, 0.04, 1.0), (0.1, 0.01, 0.0, 0.0), (0.0, 0.3, 0.0, 0.0)]
)
def test_a_budget_rests_where_the_rows_are_forgotten(
    drive: Callable[..., Driven], forget: float, drift: float, left: float, pushed: float
) -> None:
    """By rows, as the target: not by their mean, which a few certain ones hardly move; whatever the drift is."""
    probe, rule = Probe(20, forget, drift, left), drive([(0.9, 0), (0.5, 0.05)], steps=2).rule
    rule.controller = make_controller(resolve(("x", {"objective.retain_budget": 0.05})))
    rule._steer(Outcome({}, probe, probes=[look(0, 0.9, 0.0), probe]), probe, {"kl": 0.01})
    assert rule.controller.forget == pushed


@pytest.mark.parametrize(
    "looks",
    [
        [(0.9, 0), (0.3, OVER), (0.2, 0.05), (0.2, OVER), (0.2, 0.05)],  # once at a time
        [(0.9, 0), (0.3, 0.4), (0.2, 0.3), (0.2, 0.2), (0.2, 0.12), (0.2, 0.05)],  # it heals by itself
    ],
)
def test_a_drift_that_does_not_last_goes_back_nowhere(looks: list[Look], drive: Callable[..., Driven]) -> None:
    run = drive(looks, steps=12)
    assert run.said("back_to") == {} and run.outcome.returns == 0
    assert run.events[12]["multipliers"]["retain"] == 1.0


def test_it_gives_up_after_going_back_too_often(drive: Callable[..., Driven]) -> None:
    run = drive([(0.9, 0), (0.4, 0.05), (0.1, OVER)], steps=200)
    assert run.outcome.returns == STOP.patience + 1
    assert run.outcome.reason.startswith("drift above 0.1")
    assert run.outcome.steps < 200
    assert run.outcome.best.step == 2
    assert set(run.said("back_to").values()) == {2}
    assert run.rule.schedule.factor == 0.5 ** (STOP.patience + 1)
    assert run.rule.controller.scale("retain") == 2.0 ** (STOP.patience + 1)


def test_where_nothing_moves_it_pushes_harder_and_says_so_once(drive: Callable[..., Driven]) -> None:
    run = drive([(0.9, 0), (0.89, 0), (0.88, 0.001)], steps=12, schedule="constant")
    assert run.said("still") == {4: True}
    assert run.outcome.still
    forget = [run.events[step]["multipliers"]["forget"] for step in range(1, 13)]
    assert forget == sorted(forget) and forget[0] == 1 and forget[-1] == 16, "no further, by default"
    assert {run.events[step]["multipliers"]["retain"] for step in range(1, 13)} == {1.0}
    assert run.outcome.best.step == 0, "nothing has clearly moved: the untouched model is as good"


def test_who_is_on_the_way_is_not_pushed(drive: Callable[..., Driven]) -> None:
    """The target is to be reached in half of the steps, in a line in the log odds: 10 looks for 20 of 40 steps."""
    first, goal = log_odds(0.9), log_odds(STOP.target)
    line, slow = ([1 / (1 + math.exp(-(first + (goal - first) * i / n))) for i in range(11)] for n in (10, 20))
    ahead = drive([(0.9, 0), *((p - 0.001, 0.01) for p in line[1:-1])], steps=40, schedule="constant")
    early = {ahead.events[step]["multipliers"]["forget"] for step in range(1, 20)}
    assert early == {1.0} and not ahead.outcome.still
    behind = drive([(0.9, 0), *((p, 0.01) for p in slow[1:-1])], steps=40, schedule="constant")
    assert behind.events[3]["multipliers"]["forget"] > 1


def test_who_is_behind_is_not_pushed_over_half_of_the_drift_budget(drive: Callable[..., Driven]) -> None:
    run = drive([(0.9, 0), (0.89, 0.06)], steps=10)
    assert {run.events[step]["multipliers"]["forget"] for step in range(1, 11)} == {1.0}


def pushed(*found: float) -> float:
    """What the weight is multiplied by after looks every ten steps at rows so far above the target, in log odds."""
    probes = [Probe(10 * i, 0.9, 0.01, 1.0, to_go) for i, to_go in enumerate(found)]
    return stopping.harder(probes, Config(train=TrainConfig(steps=200), stop=STOP))


def test_who_is_behind_is_pushed_as_far_as_the_pace_is_too_slow() -> None:
    """Of 200 steps the target is due at 100: at step 10 there are 90 left."""
    assert pushed(10.0, 9.0) == 1.0  # on the line
    assert pushed(10.0, 9.5) == pytest.approx(9.5 / (0.05 * 90))  # behind, at half of the pace
    assert pushed(10.0, 9.9) == pushed(10.0, 10.5) == 3.0  # at most
    assert pushed(10.0, 10.0, 8.85) == 1.0  # behind, and fast enough by now: 8.85 in 80 steps
    assert pushed(*[10.0] * 15, 6.0, 4.0) == 1.0  # late: within two looks
    assert pushed(*[10.0] * 15, 6.0, 5.0) == pytest.approx(5.0 / 2)


def test_a_late_run_has_the_steps_that_there_are_for_it(drive: Callable[..., Driven]) -> None:
    late = drive([(0.9, 0), *[(0.5, 0.01)] * 25, (0.04, 0.03)], steps=40, more_steps=40)
    assert late.outcome.reason.startswith("forget target") and late.outcome.steps == 52 + 20  # met at the 26th look
    assert late.rule.schedule.rate(52) == 1.0
    in_time = drive([(0.9, 0), *[(0.5, 0.01)] * 9, (0.04, 0.03)], steps=40, more_steps=40)
    assert in_time.outcome.steps == 40 and in_time.rule.schedule.falls_from == 20
    never = drive([(0.9, 0), (0.5, 0.01)], steps=40, more_steps=40)
    assert never.outcome.reason == "all steps done" and never.outcome.steps == 80


def test_a_met_target_lets_the_rate_fall_and_then_ends_the_run(drive: Callable[..., Driven]) -> None:
    run = drive([(0.9, 0), (0.5, 0.02), (0.04, 0.03)], steps=200)
    assert run.outcome.reason == "forget target 0.05 met, and the rate has fallen to 0"
    assert run.outcome.steps == 4 + 20  # met at the look of step 4
    assert run.outcome.best.step == 24
    schedule = run.rule.schedule
    assert schedule.rate(4) == 1.0 and 0 < schedule.rate(24) < schedule.rate(14) < schedule.rate(5) < 1.0


def test_a_budget_is_waited_for_while_there_are_steps(drive: Callable[..., Driven]) -> None:
    """The target alone is half of what was asked for; and an adapter that meets both is not given up for one that does
    not, however little the two are apart."""
    run = drive(
        [(0.9, 0), (0.5, 0.02), (0.04, 0.06), (0.04, 0.06), (0.04, 0.048), (0.04, 0.052)], budget=0.05, steps=40
    )
    assert run.rule.schedule.falls_from == 8
    assert (run.outcome.best.step, run.outcome.best.drift) == (8, 0.048)


def test_the_rate_falls_only_after_every_bad_row_was_drawn(drive: Callable[..., Driven]) -> None:
    """A look sees some rows of a large file: that those are forgotten says nothing of the ones never trained on."""
    run = drive([(0.9, 0), (0.04, 0.03)], rows=20, steps=200)  # two at a time
    assert run.rule.schedule.falls_from == 10


def test_what_is_taught_is_waited_for(drive: Callable[..., Driven]) -> None:
    """A bad answer that is gone is half of what was asked for where another one is to be said."""
    taught = [3.0] * 9 + [0.01] * 200
    run = drive([(0.9, 0), (0.04, 0.03)], taught=taught, steps=100)
    assert run.rule.schedule.falls_from == 10
    never = drive([(0.9, 0), (0.04, 0.03)], taught=[3.0] * 200, steps=20)
    assert never.rule.schedule.falls_from is None and never.outcome.reason == "all steps done"


def test_a_target_that_is_met_by_a_hair_is_pushed_further(drive: Callable[..., Driven]) -> None:
    run = drive([(0.9, 0), *[(0.04, 0.03, 0.02)] * 4, (0.01, 0.03)], steps=200)
    assert run.rule.schedule.falls_from == 10 and run.outcome.reason.startswith("forget target")
    assert {run.events[step]["multipliers"]["forget"] for step in range(1, 10)} == {1.0}, "it is not pushed harder"
    never = drive([(0.9, 0), (0.04, 0.03, 1.0)], steps=40, more_steps=40)
    assert never.outcome.steps == 40 and never.outcome.best.met(STOP), "nor has it more steps"


def test_what_comes_up_again_takes_the_fall_back(drive: Callable[..., Driven]) -> None:
    met, not_met = (0.04, 0.03), (0.2, 0.03)
    looks = [(0.9, 0), met, *[not_met] * 12, met]
    run = drive(looks, steps=200)
    assert run.rule.schedule.falls_from == 28  # not at the end of the first fall, at step 22
    assert run.outcome.reason.startswith("forget target") and run.outcome.steps == 28 + 20


def test_going_back_takes_the_fall_back_too(drive: Callable[..., Driven]) -> None:
    run = drive([(0.9, 0), (0.04, 0.03), (0.01, OVER), (0.01, OVER), (0.2, 0.05), (0.04, 0.03)], steps=100)
    assert run.said("back_to") == {6: 2}
    assert run.rule.schedule.falls_from == 10  # and not 2, where it was met first


# -- what comes back in other words ------------------------------------------------------------------------


def test_what_comes_back_is_pushed_before_the_rate_falls(drive: Callable[..., Driven]) -> None:
    met, not_met = (0.04, 0.03), (0.2, 0.04)
    looks = [(0.9, 0), met, not_met, met]
    run = drive(looks, reserve=10, back=[{2, 5}, {7}, set()], steps=200)
    assert run.said("again") == {2: 2, 6: 1}
    assert run.rule.come_back == {4, 7, 9}  # their places, behind two rows
    assert run.rule.schedule.falls_from == 8 and run.outcome.steps == 8 + 20
    assert run.outcome.best.again == 3, "the adapter that was kept is one that was asked so"
    assert drive(looks, reserve=10, steps=200).rule.schedule.falls_from == 2


def test_a_late_run_asks_as_soon_as_its_target_is_met(drive: Callable[..., Driven]) -> None:
    """Where the rate falls by itself it had never asked: there were no steps left to push what comes back."""
    looks = [(0.9, 0), *[(0.2, 0.03, 1.0)] * 7, (0.04, 0.03, 1.0)]
    run = drive(looks, reserve=10, back=[{2, 5}], steps=10, more_steps=20)
    assert run.said("again") == {16: 2} and run.rule.come_back == {4, 7}
    before = drive([(0.9, 0), (0.04, 0.03, 1.0), *looks[2:]], reserve=10, back=[{2, 5}], steps=10, more_steps=20)
    assert before.said("again") == {16: 2}, "though it had met it once in time"


@pytest.mark.parametrize(("schedule", "step"), [("linear", 12), ("constant", 12), ("settle", 30)])
def test_where_the_rate_falls_by_itself_the_first_met_look_asks(
    drive: Callable[..., Driven], schedule: str, step: int
) -> None:
    """There is no fall that could begin with it; and once is enough."""
    looks = [(0.9, 0), *[(0.5, 0.01)] * (step // 2 - 1), (0.04, 0.03, 1.0)]
    run = drive(looks, reserve=2, back=[{0}, {1}], steps=40, schedule=schedule)
    assert run.said("again") == {step: 1} and run.rule.come_back == {2}
    assert json.loads(json.dumps(run.rule.state()))["asked"] is True


def test_at_the_end_a_few_may_come_back(drive: Callable[..., Driven]) -> None:
    """3 %, as of what a run is judged by: one of 40 is less, two are more."""
    looks = [(0.9, 0), (0.04, 0.03)]
    few = drive(looks, reserve=40, back=[set(), {7}], steps=200)
    assert few.said("again") == {} and few.outcome.steps == 2 + 20
    more = drive(looks, reserve=40, back=[set(), {7, 8}], steps=200)
    assert more.said("again") == {22: 2} and more.rule.schedule.falls_from == 24
    assert more.outcome.reason.startswith("forget target")


def test_who_has_no_steps_left_is_not_asked_again(drive: Callable[..., Driven]) -> None:
    looks = [(0.9, 0), *[(0.5, 0.02)] * 19, (0.04, 0.03)]
    late = drive(looks, reserve=4, back=[{0}], steps=40, more_steps=20)
    assert late.said("again") == {40: 1} and late.outcome.steps == 60
    assert drive(looks, reserve=4, back=[{0}], steps=40).said("again") == {}


def test_what_has_come_back_is_part_of_a_checkpoint(drive: Callable[..., Driven]) -> None:
    rule = drive([(0.9, 0), (0.04, 0.03)], reserve=10, back=[{2, 5}], steps=200).rule
    other = drive([(0.9, 0), (0.5, 0.03)], reserve=10, steps=4).rule
    other.load_state(json.loads(json.dumps(rule.state())))
    assert other.come_back == rule.come_back == {4, 7}


# -- what a look sees --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("known", "goal", "least"), [(1.0, 0.05**0.5, 0.05), (0.4, 0.05, 0.05**2)])
def test_a_passage_that_is_gone_is_at_its_goal(
    known: float, goal: float, least: float, monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy
) -> None:
    """Each token of a passage counts with at least the target, which is the goal of one in a model's own words: it was
    never reached, whatever was forgotten, and such rows were pushed for as long as the run lasted."""
    rows = [Example(tuple(range(5, 27)), 2, 22, 2, Record((), "x", 0, {}), known=known)]
    seen: list[float] = []

    def nlls(policy: Any, examples: Any, span: Any, limit: int, most: Sequence[float]) -> list[tuple[float, int]]:
        seen.extend(math.exp(-cap) for cap in most)
        return [(20 * cap, 20) for cap in most]  # every token as improbable as counts

    monkeypatch.setattr(stopping, "row_nlls", nlls)
    monkeypatch.setattr(stopping, "mean_kl", lambda *args: 0.0)
    roles = Roles(rows, rows, rows, NO_MISMATCH)
    found = stopping.look(new_policy("none", r=1), roles, None, Config(), 1)  # type: ignore[arg-type]
    assert seen == pytest.approx([least]) and seen[0] < goal
    assert found.left == 0 and found.to_go == 0 and found.forget == pytest.approx(least)


def test_a_look_is_at_rows_from_all_over_the_file(monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy) -> None:
    """A file that is sorted by topic was judged by its first topic; the same rows each time, else looks compare not."""
    rows = [Example((5, 6, 7, 8), 2, 4, 2, Record((), "x", i, {})) for i in range(1000)]
    marked = [replace(e, weights=(1.0, 0.0), rest=0.001) for e in rows]
    roles = Roles(rows, rows[:2], rows[:500], NO_MISMATCH, marked=marked)
    seen: dict[str, list[Sequence[Example]]] = {"bad": [], "normal": []}

    def nlls(_: object, examples: Sequence[Example], *__: object, most: float) -> list[tuple[float, int]]:
        seen["bad"].append(examples)
        # One row in four is at p = 0.5, the others at 0.01.
        return [(-math.log(0.5 if i % 4 == 0 else 0.01), 1) for i in range(len(examples))]

    def kl(_: object, __: object, examples: Sequence[Example], *___: object) -> float:
        seen["normal"].append(examples)
        return 0.07

    monkeypatch.setattr(stopping, "row_nlls", nlls)
    monkeypatch.setattr(stopping, "mean_kl", kl)
    config = Config(stop=replace(STOP, probe_rows=100))
    deep = replace(config, stop=replace(config.stop, target=0.02))
    found = [stopping.look(new_policy("none"), roles, None, config, step) for step in (0, 5)]  # type: ignore[arg-type]
    assert (found[1].step, found[1].drift, found[1].left) == (5, 0.07, 0.25)
    assert found[1].forget == pytest.approx(0.25 * 0.5 + 0.75 * 0.01)
    assert found[1].shallow == 0.25 and stopping.look(new_policy("none"), roles, None, deep, 5).shallow == 1.0  # type: ignore[arg-type]
    for kind, of in (("bad", 1000), ("normal", 500)):
        lines = [e.record.line for e in seen[kind][0]]
        assert len(lines) == 100 and max(lines) > 0.9 * of and lines[:50] != list(range(50))
        assert lines == [e.record.line for e in seen[kind][1]]
    assert all(e.weights == (1.0, 0.0) for e in seen["bad"][0]), "at what is specific"


@pytest.mark.parametrize(("rest", "p", "is_clear"), [(1.0, 0.035, True), (1.0, 0.04, False), (0.001, 0.035, False)])
def test_a_row_at_its_floor_is_clear_of_the_target(
    rest: float, p: float, is_clear: bool, monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy
) -> None:
    """What many share is left in peace at 0.03: two fifths of the target, 0.02, are never reached there."""
    row = Example((5, 6, 7, 8), 2, 4, 2, Record((), "x", 0, {}), rest=rest)
    monkeypatch.setattr(stopping, "row_nlls", lambda *_, **__: [(-math.log(p), 1)])
    monkeypatch.setattr(stopping, "mean_kl", lambda *_: 0.0)
    found = stopping.look(new_policy("none", r=1), Roles([row], [row], [row], NO_MISMATCH), None, Config(), 1)  # type: ignore[arg-type]
    assert found.met(STOP) and found.settles(STOP) == is_clear


# -- the end -----------------------------------------------------------------------------------------------


def end_after(*looks: Look, schedule: str = "constant") -> str | None:
    probes = [look(10 * i, *found) for i, found in enumerate(looks)]
    best = min(probes, key=lambda p: p.rank(STOP))
    outcome = Outcome({}, best, steps=probes[-1].step, probes=probes)
    return stopping.reason_to_stop(outcome, STOP, Schedule(TrainConfig(steps=100, schedule=schedule)))


def test_at_a_constant_rate_it_stops_when_the_target_is_met_and_drift_no_longer_falls() -> None:
    assert end_after((0.9, 0), (0.04, 0.08), (0.04, 0.07), (0.04, 0.06)) is None
    assert end_after((0.9, 0), (0.04, 0.02), (0.04, 0.06), (0.04, 0.03)) is None  # healing after a lucky first look
    assert end_after((0.9, 0), (0.2, 0.06), (0.04, 0.07), (0.04, 0.08)) is None  # not met for long enough
    rising = (0.9, 0), (0.04, 0.06), (0.04, 0.07), (0.04, 0.08)
    assert end_after(*rising) == "forget target 0.05 met, and no better for 3 looks"
    for schedule in ("linear", "settle"):
        assert end_after(*rising, schedule=schedule) is None, "it heals while the rate falls"


def test_nothing_ends_between_two_looks() -> None:
    probes = [look(10 * i, 0.04, 0.03 + 0.01 * i) for i in range(6)]
    outcome = Outcome({}, probes[1], steps=51, probes=probes, returns=9)
    assert stopping.reason_to_stop(outcome, STOP, Schedule(TrainConfig(schedule="constant"))) is None
    assert (
        stopping.reason_to_stop(replace(outcome, steps=50), STOP, Schedule(TrainConfig(schedule="constant")))
        is not None
    )


def test_a_look_is_at_what_has_come_back_as_well(monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy) -> None:
    """Only there: the other wordings have no target to meet."""
    row, back, waiting = (Example((5, 6, 7, n), 2, 4, 2, Record((), "x", n, {})) for n in range(3))
    seen: list[Example] = []

    def nlls(policy: Any, examples: Any, *_: Any, most: Sequence[float]) -> list[tuple[float, int]]:
        seen.extend(examples)
        return [(0.1 if e is back else 9.0, 1) for e in examples]

    monkeypatch.setattr(stopping, "row_nlls", nlls)
    monkeypatch.setattr(stopping, "mean_kl", lambda *args: 0.0)
    reserve = [Reserved(1, 0, back), Reserved(2, 0, waiting)]
    roles = Roles([row, back, waiting], [row], [row], NO_MISMATCH, marked=[row], starts=[(0,)], reserve=reserve)
    policy = new_policy("none", r=1)
    without, found = (stopping.look(policy, roles, None, Config(), 1, places) for places in ((), {1}))  # type: ignore[arg-type]
    assert seen == [row, row, back]
    assert (without.left, without.again) == (0.0, 0) and (found.left, found.again) == (0.5, 1)
    assert not found.met(STOP)
