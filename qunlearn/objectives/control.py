"""Steer the weights of an objective while training: budgeted forgetting by primal-dual multipliers.

The problem is min drift such that the forget target is met, or min forget loss such that drift <= budget; its
Lagrangian weighs the retain side with a multiplier that rises while drift is above the budget and falls while it is
below (primal-dual, as in PDU, arXiv 2506.05314). Steps are taken in the logarithm, so that one rate serves any scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.objectives.table import MOST_PUSH, OBJECTIVES

_SMOOTH = 0.2
_LARGEST = 1e3  # a multiplier stays within this factor of 1 either way


@dataclass
class Controller:
    """The multipliers of both sides, which scale the forget side's weights and eps3.

    With a `budget`, `retain` is steered at every step, and `forget` rests at 0 while the target is met: everything a
    step does then is to undo drift. Rows that are trained on drift less than those held back, by `gap` as of the last
    look: the budget is about the latter. Without one both are 1. In either case `push` rises while nothing is
    forgotten, and `hold` after each time the drift was too large.
    """

    budget: float | None
    rate: float
    most_push: float = MOST_PUSH
    retain: float = 1.0
    forget: float = 1.0
    push: float = 1.0
    hold: float = 1.0
    recent: float = 0.0  # KL of the last steps, smoothed
    gap: float = 1.0
    looked: bool = False

    def scale(self, role: str, *, met: bool = False) -> float:
        """Return what multiplies the weights of a role's terms; `met` for a row that is at the target."""
        if role == "retain":
            return self.retain * self.hold
        if role in ("instead", "taught"):
            return 1.0
        return self.forget * (1.0 if met else self.push)

    def step(self, kl: float | None) -> None:
        """Take a training step's KL on normal rows, where it has one: dual ascent on log(retain)."""
        if self.budget is None:
            return
        if kl is not None and math.isfinite(kl):
            self.recent += _SMOOTH * (kl - self.recent)
        excess = max(-1.0, min(2.0, self.gap * self.recent / self.budget - 1.0))
        # The first steps drift by nothing, whatever comes: until a look has told, the retain side is not let go.
        least = 1 / _LARGEST if self.looked else 1.0
        self.retain = min(_LARGEST, max(least, self.retain * math.exp(self.rate * excess)))

    def look(self, drift: float, *, met: bool, has_kl: bool) -> None:
        """Take a look: the drift of rows that are held back, and whether the target is met."""
        if self.budget is None:
            return
        self.forget, self.looked = 0.0 if met else 1.0, True
        if not has_kl:
            self.recent = drift
        elif self.recent > 0 and math.isfinite(drift):
            self.gap = max(0.5, min(8.0, drift / self.recent))

    def go_back(self, drift: float, *, met: bool) -> None:
        """Take up where an earlier adapter was, of which a look has told this: later steps say nothing of it."""
        self.recent, self.gap = drift, 1.0
        self.look(drift, met=met, has_kl=False)
        self.looked = drift > 0  # of the untouched adapter a look says no more than its first steps

    def push_harder(self, factor: float) -> None:
        """Multiply the forget side's weight, between what was asked for and `most_push` times that."""
        self.push = max(1.0, min(self.most_push, self.push * factor))

    def hold_harder(self) -> None:
        """Raise the retain side's weight: the drift was over the budget."""
        self.hold = min(_LARGEST, self.hold * 2)

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STEERED}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name in _STEERED:
            setattr(self, name, state[name])


_STEERED = ("retain", "forget", "push", "hold", "recent", "gap", "looked")


def make_controller(config: Config) -> Controller:
    """Return a controller with a budget where one was given, or where the objective has one by its nature."""
    o = config.objective
    budget = o.retain_budget
    if budget is None and OBJECTIVES[o.name].dual:
        budget = config.stop.max_drift / 2
    return Controller(budget, o.dual_rate, OBJECTIVES[o.name].most_push)
