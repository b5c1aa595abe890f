"""How the benchmarks call qunlearn: the one place that knows how its step is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from _rows import Rows
from qunlearn.config.objective import ObjectiveConfig
from qunlearn.config.settings import Config
from qunlearn.data.batch import ALL, Span
from qunlearn.data.tokenize import Example
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.table import terms_of
from qunlearn.training.gradients import MicroBatcher, backward
from qunlearn.training.sampler import Step, make_step

_MAX_TOKENS = 2048


def engine_tokens(rows: Rows) -> int:
    """Tokens that pass through the trained forward of one step, padding aside: a prompt counts once."""
    return rows.shared_tokens


def engine_supervised(rows: Rows) -> int:
    """Positions that meet the output head: what each term of the objective supervises."""
    return sum(term.span.count(example) for term, example in step_of_rows(rows).items)


@dataclass(frozen=True)
class Cache:
    """Reference states in memory, in the place of `qunlearn.model.reference.Cached`, which reads them from a file."""

    kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def states(self, examples: Sequence[Example], spans: Sequence[Span], layer: int | None = None) -> list[Tensor]:
        return [self.kept[e.input_ids][slice(*_before(s, e))] for e, s in zip(examples, spans, strict=True)]


def fill_cache(policy: Policy, steps: Sequence[Rows]) -> Cache:
    """The reference of every normal row of these steps, computed once."""
    examples = [e for rows in steps for e in rows.retain]
    found = Live(policy, _MAX_TOKENS).states(examples, [ALL] * len(examples))
    return Cache({e.input_ids: h for e, h in zip(examples, found, strict=True)})


def engine_backward(policy: Policy, rows: Rows, config: Config, cache: Cache | None) -> dict[str, float]:
    """Add the gradients of one step; each term's loss per token. With a cache no reference pass is made."""
    limit = config.train.pass_tokens
    with policy.cast_once():
        return backward(policy, step_of_rows(rows), cache or Live(policy, limit), config, limit).losses


def engine_batcher(policy: Policy, config: Config) -> MicroBatcher:
    """What makes the passes of a step, divided over processes where there are several."""
    return MicroBatcher(policy, Live(policy, config.train.pass_tokens), config, lambda _: None)


def step_of_rows(rows: Rows) -> Step:
    """The step of the objective `llmu` on these rows."""
    k = len(rows.mismatch) // max(1, len(rows.forget))
    bad = [{"forget": [e], "mismatch": rows.mismatch[k * i : k * (i + 1)]} for i, e in enumerate(rows.forget)]
    return make_step(terms_of(ObjectiveConfig("llmu")), bad, rows.retain)


def _before(span: Span, example: Example) -> tuple[int, int]:
    first, last = span.of(example)
    return first - 1, last - 1
