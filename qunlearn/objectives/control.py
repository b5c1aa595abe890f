"""Budgeted forgetting: weights that are steered while training, instead of chosen beforehand.

The problem is min drift such that the forget target is met, or min forget loss such that drift <= budget; its
Lagrangian weighs the retain side with a multiplier that rises while drift is above the budget and falls while it is
below (primal-dual, as in PDU, arXiv 2506.05314). Steps are taken in the logarithm, so that one rate serves any scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qunlearn.config import Config
from qunlearn.objectives.table import OBJECTIVES

_SMOOTH = 0.2
_LARGEST = 1e3  # a multiplier stays within this factor of 1 either way


@dataclass
class Controller:
    """The multipliers of both sides, which scale the forget side's weights and eps3.

    `forget` rests at 0 while the target is met: everything a step does then is to undo drift. Rows that are trained
    on drift less than those held back, by `gap` as of the last look: the budget is about the latter.
    """

    budget: float
    target: float
    rate: float
    retain: float = 1.0
    forget: float = 1.0
    recent: float = 0.0  # KL of the last steps, smoothed
    gap: float = 1.0

    def scale(self, role: str) -> float:
        return self.retain if role == "retain" else self.forget

    def step(self, kl: float | None) -> None:
        """After a training step, with its KL on normal rows where it has one: dual ascent on log(retain)."""
        if kl is not None and math.isfinite(kl):
            self.recent += _SMOOTH * (kl - self.recent)
        excess = max(-1.0, min(2.0, self.gap * self.recent / self.budget - 1.0))
        self.retain = min(_LARGEST, max(1 / _LARGEST, self.retain * math.exp(self.rate * excess)))

    def look(self, forget: float, drift: float, *, has_kl: bool) -> None:
        """After a look at the bad answers' probability and the drift of rows that are held back."""
        self.forget = 0.0 if forget <= self.target else 1.0
        if not has_kl:
            self.recent = drift
        elif self.recent > 0 and math.isfinite(drift):
            self.gap = max(0.5, min(8.0, drift / self.recent))

    def state(self) -> dict[str, Any]:
        return {"retain": self.retain, "forget": self.forget, "recent": self.recent, "gap": self.gap}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.retain, self.forget = state["retain"], state["forget"]
        self.recent, self.gap = state["recent"], state["gap"]


def make_controller(config: Config) -> Controller | None:
    """A controller where a budget was given, or where the objective is one by its nature."""
    o = config.objective
    if o.retain_budget is None and not OBJECTIVES[o.name].dual:
        return None
    budget = o.retain_budget if o.retain_budget is not None else config.stop.max_drift / 2
    return Controller(budget, config.stop.target, o.dual_rate)
