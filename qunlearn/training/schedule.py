"""The learning-rate schedule: a warm-up, a plateau, and a decay that begins when the target is met."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qunlearn.config.training import TrainConfig

_PLATEAU = 0.7  # share of the usual steps after which the rate falls, unless there are more for who is late
_FALL, _LEAST_FALL = 0.5, 20  # steps of the fall, in steps so far, and at least
_WIDE_LR = 1e-4  # of models of width 4096
_LONGEST_FALL = 0.35  # steps of the fall at most, in usual steps


@dataclass
class Schedule:
    """The share of the peak learning rate at each step, and whether the run may end.

    Constant, or falling in a line to 0 over all steps (linear), or constant until `settle` is called (settle): what is
    forgotten by then needs no further push, and the rest heals while the rate falls. `put_off` adds the steps that
    there are for who is late, and `halve` halves what is left of the rate.
    """

    config: TrainConfig
    factor: float = 1.0
    falls_from: int | None = None
    late: bool = False

    @property
    def last(self) -> int:
        """Return the last step of all."""
        return self.config.most_steps if self.late else self.config.usual_steps

    def steps(self, done: int) -> Iterator[int]:
        """Count the steps behind so many, as long as there are any."""
        while done < self.last:
            done += 1
            yield done

    def rate(self, step: int) -> float:
        """Return the share at a step, from 1."""
        c = self.config
        if step <= c.warmup:
            return self.factor * step / c.warmup
        if c.schedule == "constant":
            return self.factor
        first, last = (c.warmup, self.last) if c.schedule == "linear" else self._fall
        return self.factor * max(0.0, min(1.0, (last + 1 - step) / (last + 1 - first)))

    @property
    def _fall(self) -> tuple[int, int]:
        """The last step at the full rate, and the last step of the fall."""
        usual = self.config.usual_steps
        if self.falls_from is None:
            full = max(self.config.warmup, int(_PLATEAU * usual))
            return full + self.last - usual, self.last
        fall = min(round(_FALL * self.falls_from), round(_LONGEST_FALL * usual))
        return self.falls_from, min(self.last, self.falls_from + max(_LEAST_FALL, fall))

    def settle(self, step: int) -> None:
        """Let the rate fall from here on, where nothing has begun to."""
        if self.can_settle(step):
            self.falls_from = step

    def can_settle(self, step: int) -> bool:
        """Return whether the rate can still be let fall from a step on: nothing has begun to."""
        return self.config.schedule == "settle" and self.falls_from is None and step < self._fall[0]

    def put_off(self, until: int) -> None:
        """Add the steps there are for who is late, where the rate would fall before a step by itself."""
        if self.config.schedule == "settle" and self.falls_from is None and until > self._fall[0]:
            self.late = self.late or self.config.most_steps > self.config.usual_steps

    def rise(self) -> None:
        """Take the fall back: what was forgotten has come up again."""
        self.falls_from = None

    def halve(self) -> None:
        """Halve the rate from here on."""
        self.factor /= 2

    def settled(self, step: int) -> bool:
        """Return whether a fall that `settle` began is over."""
        return self.falls_from is not None and step >= self._fall[1]

    def ends_early(self, step: int) -> bool:
        """Return whether the steps end here, or the fall does, though there may be more of them."""
        return step < self.config.most_steps and (step == self.last or self.settled(step))

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor, "falls_from": self.falls_from, "late": self.late}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.factor, self.falls_from, self.late = state["factor"], state["falls_from"], state["late"]


def auto_lr(hidden_size: int, small: float = 2e-3) -> float:
    """Return a peak learning rate for LoRA that falls with the model's width: `small` at 160, 1e-4 at 4096.

    Two points define it: what was measured on small models (docs/log.md) and the low end of what is published for
    LoRA on 7B models (1e-4 to 2e-4); between them a power law.
    """
    exponent = math.log(small / _WIDE_LR) / math.log(4096 / 160)
    return float(min(small, _WIDE_LR * (4096 / hidden_size) ** exponent))
