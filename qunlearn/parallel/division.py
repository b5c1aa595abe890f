"""Divide a step's forward passes over processes, so that all are busy for about as long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qunlearn.data.batch import PrefixGroup, Row
from qunlearn.parallel.ranks import current

# Sizes of a pass that are tried, in even shares of the step's tokens: an exact share seldom packs without a rest.
_SIZES = (1.0, 1.1, 1.25, 1.5, 2.0)
_PASS_TOKENS = 64  # what a pass costs beside its tokens, for 4-bit weights are dequantised in each
Pass = list[Row]


def my_share(made: Sequence[PrefixGroup], limit: int, passes_of: Callable[[int], list[Pass]]) -> Sequence[Pass]:
    """Return this process's passes of a step; all of them where there is one process.

    `made` are the step's groups of rows, `passes_of` lays them out in passes of at most so many tokens, and `limit` is
    the most that fits. With several processes passes are made smaller, so that each process has as many, and of a few
    sizes that is taken with which the busiest process has least to do. All decide alike, without a word.
    """
    ranks = current()
    if ranks.count == 1:
        return passes_of(limit)
    even = sum(group.length for group in made) / ranks.count
    rounds = math.ceil(even / limit)  # passes of each process, at least
    evens = (even / rounds, even / (rounds + 1))
    tried = sorted({max(1, min(limit, math.ceil(size * part))) for size in _SIZES for part in evens})
    made_of = [passes_of(most) for most in tried]
    best = min(made_of, key=lambda passes: max(loads(passes, ranks.count)))
    return [best[i] for i in shares([cost(one) for one in best], ranks.count)[ranks.number]]


def cost(one: Pass) -> float:
    """Return what a pass costs, in tokens with padding."""
    return _PASS_TOKENS + len(one) * max(sum(group.length for group in row) for row in one)


def loads(passes: Sequence[Pass], count: int) -> list[float]:
    """Return what each process has to do."""
    costs = [cost(one) for one in passes]
    return [sum(costs[i] for i in part) for part in shares(costs, count)]


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Return the places of each process's parts: the longest goes to whoever has least, then to the lower number."""
    loaded, out = [0.0] * count, [list[int]() for _ in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        number = min(range(count), key=lambda n: (loaded[n], n))
        loaded[number] += costs[i]
        out[number].append(i)
    return [sorted(part) for part in out]
