"""Early stopping: look at target and drift, keep the best adapter, steer weights and rate, end the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.config.training import StopConfig
from qunlearn.data.batch import ANSWER
from qunlearn.evaluation.metrics import LEAKS
from qunlearn.evaluation.scores import mean_kl, row_goal, row_nlls, score_rows
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference
from qunlearn.objectives.control import Controller
from qunlearn.objectives.table import TAUGHT
from qunlearn.roles.roles import Roles
from qunlearn.roles.split import sampled
from qunlearn.training.outcome import Outcome, Probe
from qunlearn.training.schedule import Schedule

# Of two looks at one model with other rows the drifts differ by so much (docs/log.md, 2026-11-25).
_DRIFT_NOISE = 1.25
_CLEARLY = 0.05  # share of the way to the target from which a look is better than the untouched model
_CLEAR = 0.4  # share of its goal below which a row needs no further push
_AT_REST = 1.25  # times its floor at which a row is as good as left in peace
_STILL = 0.9  # share of the first probability above which nothing has moved
_LEARNT = 0.3  # cross-entropy per token of what is taught, from which it is said
_HARDER = 3.0  # what the forget side's weight is multiplied by at most at a look that finds it behind
_SOON = 2  # looks within which the target should be reached by who is late
BACK_TO = "back_to"  # in an event: the step whose adapter the run went back to
AGAIN = "again"  # in an event: how many bad rows have come back in other words
OTHERWISE_LEFT = 0.03  # share of the prompts in other words that may still get a bad answer
_ON_THE_WAY = 0.5  # share of the steps in which the target should be reached, in a line in the log odds


class EarlyStopping:
    """Keeps the best adapter, steers the weights and the learning rate, and ends a run: all from what looks find."""

    def __init__(
        self,
        policy: Policy,
        roles: Roles,
        reference: Reference,
        config: Config,
        schedule: Schedule,
        controller: Controller,
    ) -> None:
        self.policy, self.roles, self.reference, self.config = policy, roles, reference, config
        self.schedule, self.controller = schedule, controller
        self.come_back: set[int] = set()  # places of bad rows in other words
        self.met_late = False  # whether a run that is late has met its target
        self.asked = False  # whether it was ever asked in other words
        self.epoch = math.ceil(roles.rows / config.train.batch_size)  # steps that draw each bad row once

    def start(self, observe: Callable[[Mapping[str, Any]], None]) -> Outcome:
        """Return the outcome of no step at all: the adapter as it begins, and the first look."""
        outcome = Outcome(self.policy.adapter_state(), self._probe(0))
        outcome.probes.append(outcome.best)
        observe({"step": 0, "forget": outcome.best.forget, "drift": outcome.best.drift})
        return outcome

    def due(self, step: int) -> bool:
        """Return whether to look after this step."""
        last = step == self.schedule.last
        return step % self.config.stop.check_every == 0 or last or self.schedule.settled(step)

    def look(self, outcome: Outcome, step: int, event: Mapping[str, Any]) -> dict[str, Any]:
        """Look, keep the adapter where it is the best, and answer what was seen; returns what the event says of it."""
        probe = self._probe(step)
        consider(outcome, probe, self.policy, _within_budget(self.config))
        said = {"forget": probe.forget, "drift": probe.drift, "left": probe.above(self.config.stop)}
        said |= self._steer(outcome, probe, event)
        met = probe.met(self.config.stop) and is_within(probe.drift, self.config)
        first = met and self.schedule.late and not self.met_late
        self.met_late = self.met_late or first
        if met and (back := self._comes_back(step, first=first)):
            self.come_back |= back
            self.schedule.rise()
            met, said = False, said | {AGAIN: len(back)}
        if not met:
            self.schedule.put_off(step + self.config.stop.check_every)
        return said

    def reason(self, outcome: Outcome) -> str | None:
        """Return why the run ends before its steps are done, after a look."""
        why = reason_to_stop(outcome, self.config.stop, self.schedule)
        gives_up = outcome.returns > self.config.stop.patience
        return why if gives_up or is_within(outcome.probes[-1].drift, self.config) else None

    def _probe(self, step: int) -> Probe:
        return look(self.policy, self.roles, self.reference, self.config, step, self.come_back)

    def _steer(self, outcome: Outcome, probe: Probe, event: Mapping[str, Any]) -> dict[str, Any]:
        """Push harder where nothing moves, go back where the drift is too large, and let the rate fall where the
        target is met."""
        stop, looks = self.config.stop, len(outcome.probes) - 1
        said: dict[str, Any] = {}
        if over(outcome.probes, stop):
            outcome.returns += 1
            self.schedule.halve()
            self.schedule.rise()
            self.controller.push_harder(1 / _HARDER)
            self.controller.hold_harder()
            self.controller.go_back(outcome.best.drift, met=outcome.best.forgets(stop))
            self.policy.load_adapter_state(outcome.state)
            # What was seen of the adapter that is given up says nothing of this one.
            outcome.probes.append(replace(outcome.best, step=probe.step))
            return {BACK_TO: outcome.best.step}
        self.controller.look(probe.drift, met=probe.forgets(stop), has_kl="kl" in event)
        if (factor := harder(outcome.probes, self.config)) > 1:
            self.controller.push_harder(factor)
            if looks == 2 and probe.forget > _STILL * outcome.probes[0].forget:
                outcome.still, said = True, {"still": True}
        learnt = event.get(TAUGHT.name, 0.0) <= _LEARNT
        if probe.settles(stop) and probe.step >= self.epoch and learnt and is_within(probe.drift, self.config):
            self.schedule.settle(probe.step)
        elif self.schedule.settled(probe.step) and not probe.met(stop):
            self.schedule.rise()
        return said

    def _comes_back(self, step: int, *, first: bool) -> set[int]:
        """Ask in other words, where the rate begins to fall, or would no more where the target is first met, where a
        late run meets it `first`, or where a run would end though there are more steps; returns what comes back that
        had not before: at the end only more than may be."""
        begins = first or step == self.schedule.falls_from
        begins |= step < self.schedule.last and not (self.asked or self.schedule.late or self.schedule.can_settle(step))
        waiting = [one for one in self.roles.reserve if one.place not in self.come_back]
        if not waiting or not (begins or self.schedule.ends_early(step)):
            return set()
        self.asked = True
        with self.policy.measured():
            found = score_rows(self.policy, [one.watched for one in waiting], self.config.train.pass_tokens)
        back = {one.place for one, row in zip(waiting, found, strict=True) if row.verdict == LEAKS}
        return back if begins or len(back) > OTHERWISE_LEFT * len(self.roles.reserve) else set()

    def state(self) -> dict[str, Any]:
        return {"come_back": sorted(self.come_back), "met_late": self.met_late, "asked": self.asked}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.come_back.update(state["come_back"])
        self.met_late, self.asked = bool(state["met_late"]), bool(state["asked"])


def look(
    policy: Policy, roles: Roles, reference: Reference, config: Config, step: int, come_back: Collection[int] = ()
) -> Probe:
    """Look at a sample of the bad rows, with those in other words that have come back, and at the drift on rows that
    are held back."""
    limit, n, seed = config.train.pass_tokens, config.stop.probe_rows, config.train.seed
    again = [one.watched for one in roles.reserve if one.place in come_back]
    watched = [*sampled(roles.watched, n, seed), *again]
    goals = [row_goal(ANSWER.count(example), example.known, config.stop.target) for example in watched]
    # Of a passage half of the tokens could be gone for good, and the others certain, before its goal is reached.
    most = [-math.log(max(min(config.stop.target, goal * goal), 1e-9)) for goal in goals]
    with policy.measured():
        rows = row_nlls(policy, watched, ANSWER, limit, most=most)
        drift = mean_kl(policy, reference, sampled(roles.held_back, n, seed), limit)
    found = [math.exp(-nll / max(1, tokens)) for nll, tokens in rows]
    left = sum(p > goal for p, goal in zip(found, goals, strict=True)) / len(rows)
    floors = [config.objective.rest * example.rest for example in watched]
    clear = [max(_CLEAR * goal, min(goal, _AT_REST * floor)) for goal, floor in zip(goals, floors, strict=True)]
    shallow = sum(p > enough for p, enough in zip(found, clear, strict=True)) / len(rows)
    # Rows that are far below do not make up for those that are above.
    to_go = fmean(max(0.0, _log_odds(p) - _log_odds(goal)) for p, goal in zip(found, goals, strict=True))
    return Probe(step, fmean(found), drift, left, to_go, shallow, len(again))


def has_moved(first: Probe, probe: Probe, stop: StopConfig) -> bool:
    """Return whether more is forgotten than noise would tell: else the untouched model is as good, and drifts less."""
    return probe.met(stop) or probe.forget <= first.forget - _CLEARLY * max(0.0, first.forget - stop.target)


def as_good(probe: Probe, probes: Sequence[Probe], stop: StopConfig) -> bool:
    """Return whether it meets the target within the budget as clearly as any, at a drift within noise of the least
    that did."""
    met = min((p.rank(stop) for p in probes if p.met(stop)), default=None)
    return met is not None and probe.rank(stop)[:-1] == met[:-1] and probe.drift <= _DRIFT_NOISE * met[-1]


def harder(probes: Sequence[Probe], config: Config) -> float:
    """Return what the forget side's weight is multiplied by after a look: 1 where enough is forgotten by now, or will
    be in time at the pace of the last steps, and where the drift leaves no room; else as much as the pace is short of
    it, up to three."""
    stop, steps = config.stop, config.train.usual_steps
    first, before, last = probes[0], probes[-2], probes[-1]
    due = first.to_go * max(0.0, 1 - last.step / (_ON_THE_WAY * steps))
    if last.met(stop) or last.drift > stop.max_drift / 2 or last.to_go <= due:
        return 1.0
    gone, taken = before.to_go - last.to_go, last.step - before.step
    left = max(_SOON * taken, _ON_THE_WAY * steps - last.step)
    return max(1.0, min(_HARDER, last.to_go * taken / max(gone * left, 1e-9)))


def over(probes: Sequence[Probe], stop: StopConfig) -> bool:
    """Return whether drift was over the budget twice and does not fall, as it does for a while after a first peak."""
    last = probes[-2:]
    return len(last) == 2 and all(p.drift > stop.max_drift for p in last) and last[1].drift > 0.9 * last[0].drift


def is_within(drift: float, config: Config) -> bool:
    """Return whether the drift is within the budget that was asked for, if any was."""
    budget = config.objective.retain_budget
    return budget is None or drift <= budget


def _within_budget(config: Config) -> StopConfig:
    """Return by what an adapter is the best: the drift that was asked for, where that is less than what may be."""
    most = min(config.stop.max_drift, config.objective.retain_budget or math.inf)
    return replace(config.stop, max_drift=most)


def consider(outcome: Outcome, probe: Probe, policy: Policy, stop: StopConfig) -> None:
    """Keep the adapter of this look if it is the best one so far, or as good as can be told and has healed longer."""
    outcome.probes.append(probe)
    finite = math.isfinite(probe.forget) and math.isfinite(probe.drift)
    better = probe.rank(stop) < outcome.best.rank(stop) and has_moved(outcome.probes[0], probe, stop)
    if finite and (better or as_good(probe, outcome.probes, stop)):
        outcome.best, outcome.state = probe, policy.adapter_state()


def reason_to_stop(outcome: Outcome, stop: StopConfig, schedule: Schedule) -> str | None:
    """Return why a run ends before its steps are done, after a look."""
    last = outcome.probes[-1]
    if last.step != outcome.steps:
        return None
    if outcome.returns > stop.patience:
        return f"drift above {stop.max_drift:g} nats/token again after going back {stop.patience} times"
    if last.met(stop) and schedule.settled(last.step):
        return f"forget target {stop.target:g} met, and the rate has fallen to 0"
    if schedule.config.schedule == "constant" and len(outcome.probes) > stop.patience:
        recent = outcome.probes[-stop.patience :]
        looked = len({p.step for p in recent}) == len(recent)  # no going back among them
        if looked and all(p.met(stop) for p in recent) and last.drift >= fmean(p.drift for p in recent[:-1]):
            return f"forget target {stop.target:g} met, and no better for {stop.patience} looks"
    return None


def _log_odds(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))
