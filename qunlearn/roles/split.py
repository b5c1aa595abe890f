"""Split the retain set into rows to train on and rows held back, and sample rows by seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.errors import DataError

T = TypeVar("T")
_HELD_BACK = 32  # rows that are held back at least, where there are four times as many


def split_held_back(
    examples: Sequence[Example], share: float, seed: int, subject: Callable[[Record], str | None] = lambda _: None
) -> tuple[list[Example], list[Example]]:
    """(trained on, held back): a seeded share of at least one row, whole records staying on one side (of a long text
    each window is one), and all that ask about the same `subject`: what is known of whom nothing was trained on is told
    by rows about others."""
    order = sorted({id(example.record): example.record for example in examples}.values(), key=lambda r: r.line)
    if len(order) < 2:
        raise DataError("at least two rows of normal data are needed: one to train on, one to measure drift")
    together: dict[str | int, list[Record]] = {}
    for record in order:
        together.setdefault(subject(record) or id(record), []).append(record)
    groups = [*together.values()]
    random.Random(seed).shuffle(groups)
    # Fewer would make drift the noise of single rows.
    n = max(1, round(share * len(order)), min(_HELD_BACK, len(order) // 4))
    held: set[int] = set()
    for group in groups:
        if len(held) < n and len(held) + len(group) < len(order):
            held.update(id(record) for record in group)
    if not held:  # all ask about the same one
        held.update(id(record) for record in groups[0][:n])
    inside = [example for example in examples if id(example.record) not in held]
    return inside, [example for example in examples if id(example.record) in held]


def sampled(examples: Sequence[T], n: int, seed: int) -> list[T]:
    """Return at most `n` of the examples, drawn from the seed, in their order: a file may be sorted by topic."""
    if len(examples) <= n:
        return list(examples)
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), n))]
