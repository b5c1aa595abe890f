"""Looks: how probable the bad answers still are, how far the model has drifted, and what the two say of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from qunlearn.config.settings import Config, StopConfig
from qunlearn.data.batch import ANSWER
from qunlearn.evaluation.scores import mean_kl, row_goal, row_nlls
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference
from qunlearn.roles.roles import Roles
from qunlearn.roles.split import sampled

# Of two looks at one model with other rows the drifts differ by so much (docs/log.md, 2026-11-25).
_DRIFT_NOISE = 1.25
_CLEARLY = 0.05  # share of the way to the target from which a look is better than the untouched model
_ON_THE_WAY = 0.5  # share of the steps in which the target should be reached, in a line in the log odds


@dataclass(frozen=True)
class Probe:
    """One look. `forget`: mean probability of the bad answers; `left`: share of them that is above the target, known
    by the mean alone where rows were not looked at; `to_go`: how far their log odds are above it, in the mean;
    `drift`: KL(base || policy), nats per token."""

    step: int
    forget: float
    drift: float
    left: float | None = None
    to_go: float = 0.0

    def above(self, stop: StopConfig) -> float:
        """Return the share of rows above the target, or the share that may be, where it is less."""
        return max(float(self.forget > stop.target) if self.left is None else self.left, stop.rows_left)

    def rank(self, stop: StopConfig) -> tuple[bool, float, float, float]:
        """Lower is better: within the drift budget, then rows forgotten, then how far the others are, then drift."""
        above = self.above(stop)
        far = stop.target if above <= stop.rows_left else max(self.forget, stop.target)
        return self.drift > stop.max_drift, above, far, self.drift

    def met(self, stop: StopConfig) -> bool:
        """Return whether the target is met within the drift budget."""
        return self.rank(stop)[:2] == (False, stop.rows_left)


def look(policy: Policy, roles: Roles, reference: Reference, config: Config, step: int) -> Probe:
    """Look at a sample of the bad rows, and at the drift on rows that are held back."""
    limit, n, seed = config.train.max_tokens, config.stop.probe_rows, config.train.seed
    most = -math.log(max(config.stop.target, 1e-9))
    with policy.measured():
        watched = sampled(roles.watched, n, seed)
        rows = row_nlls(policy, watched, ANSWER, limit, most=most)
        drift = mean_kl(policy, reference, sampled(roles.held_back, n, seed), limit)
    found = [math.exp(-nll / max(1, tokens)) for nll, tokens in rows]
    counted = zip(watched, rows, strict=True)
    goals = [row_goal(tokens, example.known, config.stop.target) for example, (_, tokens) in counted]
    left = sum(p > goal for p, goal in zip(found, goals, strict=True)) / len(rows)
    # Rows that are far below do not make up for those that are above.
    to_go = fmean(max(0.0, _log_odds(p) - _log_odds(goal)) for p, goal in zip(found, goals, strict=True))
    return Probe(step, fmean(found), drift, left, to_go)


def has_moved(first: Probe, probe: Probe, stop: StopConfig) -> bool:
    """Whether more is forgotten than noise would tell: else the untouched model is as good, and drifts less."""
    return probe.met(stop) or probe.forget <= first.forget - _CLEARLY * max(0.0, first.forget - stop.target)


def as_good(probe: Probe, probes: Sequence[Probe], stop: StopConfig) -> bool:
    """Whether it meets the target within the budget, at a drift that is within the noise of the least that did."""
    least = min((p.drift for p in probes if p.met(stop)), default=-math.inf)
    return probe.met(stop) and probe.drift <= _DRIFT_NOISE * least


def is_behind(first: Probe, probe: Probe, config: Config) -> bool:
    """Whether less is forgotten than should be by now, at a drift that leaves room for more."""
    stop, until = config.stop, _ON_THE_WAY * config.train.most_steps
    if probe.met(stop) or probe.drift > stop.max_drift / 2:
        return False
    return probe.to_go > first.to_go * max(0.0, 1 - probe.step / until)


def over(probes: Sequence[Probe], stop: StopConfig) -> bool:
    """Whether the drift was over the budget twice and does not fall: after the first blow it does for a while."""
    last = probes[-2:]
    return len(last) == 2 and all(p.drift > stop.max_drift for p in last) and last[1].drift > 0.9 * last[0].drift


def _log_odds(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))
