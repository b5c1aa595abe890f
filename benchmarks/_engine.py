"""How the benchmarks call qunlearn: the one place that knows how its step is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from unittest import mock

import torch
from torch import Tensor

from _rows import Rows
from qunlearn import train
from qunlearn.config import Config
from qunlearn.data.batch import Span, collate
from qunlearn.data.tokenize import Example
from qunlearn.model.policy import Policy
from qunlearn.objectives.table import OBJECTIVES

# Whether the engine computes a prompt once for all its answers.
SHARED_PROMPTS = False

# What stands for the cached reference: hidden states (N, D) by the identity of the normal row.
Cache = Mapping[int, Tensor]


def engine_tokens(rows: Rows) -> int:
    """Tokens that pass through the trained forward of one step, padding aside."""
    return rows.shared_tokens if SHARED_PROMPTS else rows.row_tokens


def engine_supervised(rows: Rows) -> int:
    """Positions that meet the output head: what each term of the objective supervises."""
    step = rows.by_role()
    spans = ((term.span.of(e) for e in step[term.role]) for term in OBJECTIVES["llmu"].terms)
    return sum(last - max(first, 1) for of_term in spans for first, last in of_term)


def fill_cache(policy: Policy, steps: Sequence[Rows]) -> Cache:
    """The reference of every normal row of these steps, computed once."""
    cache = {}
    for example in (e for rows in steps for e in rows.retain):
        batch = collate([example], Span("all"), policy.tokenizer.pad_token_id).to(policy.device)
        with policy.reference():
            cache[id(example)] = policy.hidden(batch)[batch.predict]
    return cache


def engine_backward(policy: Policy, rows: Rows, config: Config, cache: Cache | None) -> dict[str, float]:
    """Add the gradients of one step; each term's loss per token. With a cache no reference pass is made."""
    terms = OBJECTIVES[config.objective.name].terms
    if cache is None:
        return train._backward(policy, terms, rows.by_role(), config)[0]

    def looked_up(_policy: Policy, examples: Sequence[Example], _span: Span) -> Tensor:
        return torch.cat([cache[id(e)] for e in examples])

    with mock.patch.object(train, "_reference", looked_up):
        return train._backward(policy, terms, rows.by_role(), config)[0]
