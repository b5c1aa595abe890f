"""The outcome of a run of the training loop, so far or at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qunlearn.config.training import StopConfig

if TYPE_CHECKING:
    from qunlearn.training.checkpoint import Snapshot


@dataclass(frozen=True)
class Probe:
    """One look. `forget`: mean probability of the bad answers; `left`: share of them that is above the target, known
    by the mean alone where rows were not looked at; `to_go`: how far their log odds are above it, in the mean;
    `shallow`: share of them that is not clearly below it; `drift`: KL(base || policy), nats per token; `again`: how
    many bad rows in other words were looked at as well, since they had come back."""

    step: int
    forget: float
    drift: float
    left: float | None = None
    to_go: float = 0.0
    shallow: float = 0.0
    again: int = 0

    def above(self, stop: StopConfig) -> float:
        """Return the share of rows above the target, or the share that may be, where it is less."""
        return max(float(self.forget > stop.target) if self.left is None else self.left, stop.rows_left)

    def rank(self, stop: StopConfig) -> tuple[bool, int, float, float, bool, float]:
        """Lower is better: within the drift budget, then in how many words more it was looked at, then rows forgotten,
        then how far the others are, then whether they are clearly below the target, then drift."""
        above = self.above(stop)
        far = stop.target if above <= stop.rows_left else max(self.forget, stop.target)
        return self.drift > stop.max_drift, -self.again, above, far, self.shallow > stop.rows_left, self.drift

    def met(self, stop: StopConfig) -> bool:
        """Return whether the target is met within the drift budget."""
        return self.drift <= stop.max_drift and self.forgets(stop)

    def forgets(self, stop: StopConfig) -> bool:
        """Return whether as many rows are at the target as should be, whatever the drift is."""
        return self.above(stop) == stop.rows_left

    def settles(self, stop: StopConfig) -> bool:
        """Return whether nothing needs a further push: the target is met, and not by a hair."""
        return self.met(stop) and self.shallow <= stop.rows_left


@dataclass
class Outcome:
    """What a run of the loop led to. `state` is the adapter of `best`, not of the last step."""

    state: Mapping[str, Tensor]
    best: Probe
    reason: str = "all steps done"
    steps: int = 0
    skipped: int = 0
    skips_in_a_row: int = 0
    returns: int = 0  # times the run went back to its best adapter
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    failed: bool = False
    still: bool = False  # nothing had moved at the second look
    probes: list[Probe] = field(default_factory=list)
    multipliers: dict[str, float] | None = None  # as they ended

    def counted(self, step: int, tokens: int, finite: bool) -> bool:
        """Count a step; returns whether it may move the adapter: numbers that are not finite move nothing."""
        self.steps, self.tokens = step, self.tokens + tokens
        self.skips_in_a_row = 0 if finite else self.skips_in_a_row + 1
        self.skipped += not finite
        return finite

    def is_over(self, max_skips: int, reason: str | None) -> bool:
        """Return whether the run ends before its steps are done, and remember why."""
        if self.skips_in_a_row >= max_skips:
            self.failed, reason = True, f"{self.skips_in_a_row} non-finite steps in a row"
        if reason:
            self.reason = reason
        return bool(reason)

    def values(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("state", "best", "probes")}
        return plain | {"best": asdict(self.best), "probes": [asdict(probe) for probe in self.probes]}

    @classmethod
    def of(cls, found: Snapshot) -> Outcome:
        """Return the outcome so far, as a checkpoint has it."""
        values = dict(found.values["outcome"])
        best, probes = Probe(**values.pop("best")), [Probe(**probe) for probe in values.pop("probes")]
        return cls(found.under("best."), best, probes=probes, **values)

    @classmethod
    def unwatched(cls) -> Outcome:
        """Return the outcome of no step yet, of a run without early stopping: no look, and no best adapter."""
        return cls({}, Probe(0, math.nan, math.nan))
