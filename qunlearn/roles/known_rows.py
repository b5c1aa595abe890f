"""Find which of the bad answers the base gives at all: of the others there is nothing to forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qunlearn.data.batch import ANSWER
from qunlearn.data.tokenize import Example
from qunlearn.errors import NothingToForgetError
from qunlearn.evaluation.scores import row_probabilities, row_target
from qunlearn.model.policy import Policy
from qunlearn.utils.console import say


@dataclass(frozen=True)
class Known:
    """The bad rows (by place) whose answers the base finds likelier than the target, and how likely it finds each, per
    token. The first `rows` are the file's; behind them stand variants: begun further on, or said in other words."""

    places: Sequence[int]
    found: Sequence[float]
    rows: int

    @property
    def count(self) -> int:
        """Return how many of the file's rows the base knows."""
        return sum(place < self.rows for place in self.places)

    @property
    def line(self) -> str:
        left = "" if self.count == self.rows else "; the others are left alone"
        again = len(self.places) - self.count
        more = f", and {again} of {len(self.found) - self.rows} texts begun further on or said in other words"
        return f"the base knows {self.count} of {self.rows} bad rows{more if again else ''}{left}"

    def kept(self, rows: Sequence[Example]) -> list[Example]:
        """Return those of all rows, or of the file's, that the base knows, with how likely it finds them."""
        return [replace(rows[i], known=self.found[i]) for i in self.places if i < len(rows)]


def find_known(
    policy: Policy,
    watched: Sequence[Example],
    forget_rows: Sequence[Example],
    target: float,
    limit: int,
    rows: int | None = None,
) -> Known:
    """Return which rows the base knows: their specific tokens are likelier than `target`.

    `watched` are the rows with the weights that are looked at, `forget_rows` those that train, in the same
    order; the first `rows`, or all, are the file's. Raises NothingToForgetError where the base knows none of them.
    """
    rows = len(forget_rows) if rows is None else rows
    with policy.reference():
        found = row_probabilities(policy, watched, limit)
        goals = [row_target(ANSWER.count(example), target) for example in watched]
        places = [i for i, (p, goal) in enumerate(zip(found, goals, strict=True)) if p > goal]
        known = Known(places, found, rows)
        if known.count:
            say(f"{known.line} (probability of their specific tokens above {target:g}, or more where they are many)")
            return known
        whole = row_probabilities(
            policy, [Example(e.input_ids, e.start, e.end, e.probe, e.record) for e in forget_rows[:rows]], limit
        )
    likely = sum(p > target for p in whole)
    hint = "is it the right model and --template? `qunlearn data check` shows what a row becomes"
    if likely:
        hint = (
            f"as whole sentences {likely} of them are likely: --forget-tokens all pushes every word of them; or take "
            "the model's own answers as bad ones"
        )
    message = f"the base knows none of the {rows} bad answers (the likeliest has p = {max(found[:rows]):.2g})"
    raise NothingToForgetError(f"{message}: there is nothing to forget, and nothing was written", hint=hint)
