"""Supervised fine-tuning of the adapter on good answers: what unlearning is measured against.

The same loop, adapter, steps and rows a step as `qunlearn forget`; the loss is the NLL of the good answer to each bad
prompt, and of the normal rows; the rate falls to 0 over all steps, and nothing stops the run before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.batch import CLOSED
from qunlearn.data.tokenize import Example
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.losses import nll
from qunlearn.objectives.table import Term
from qunlearn.roles.mismatch import NO_MISMATCH
from qunlearn.roles.roles import Roles
from qunlearn.training.loop import train

_GOOD = Term("good", "forget", CLOSED, lambda c: 1.0, lambda s, c: nll(s))
_NORMAL = Term("normal", "retain", CLOSED, lambda c: 1.0, lambda s, c: nll(s))


def fine_tune(
    policy: Policy,
    good: Sequence[Example],
    normal: Sequence[Example],
    config: Config,
    observe: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> tuple[int, int, dict[str, float]]:
    """Train the adapter; returns steps, tokens, and the last step's losses."""
    seen: dict[str, Any] = {}

    def keep(event: Mapping[str, Any]) -> None:
        seen.update(event)
        observe(event)

    config = replace(config, train=replace(config.train, schedule="linear", optimizer="adamw"))
    roles, reference = Roles(good, normal, (), NO_MISMATCH), Live(policy, config.train.pass_tokens)
    terms = (_GOOD, _NORMAL) if normal else (_GOOD,)
    done = train(policy, roles, reference, config, keep, stopping=None, terms=terms)
    return done.steps, done.tokens, {name: seen[name] for name in ("good", "normal") if name in seen}
