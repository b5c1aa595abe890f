"""Compute a data file's statistics: lengths, repetitions, and the overlap with another file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qunlearn.data.records import Dataset, Record
from qunlearn.utils.text import folded

_BARS = 12


@dataclass(frozen=True)
class Histogram:
    """How many values lie from `edges[i]` up to, not including, `edges[i + 1]`; the last bin has both its ends."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    least: int
    median: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int], bars: int = _BARS) -> Histogram:
        """At most `bars` bins of one width, which is 1, 2 or 5 times a power of ten."""
        low, high = min(values), max(values)
        width = _round_width(max(1, math.ceil((high - low + 1) / bars)))
        first = low // width * width
        n = (high - first) // width + 1
        counts = [0] * n
        for value in values:
            counts[(value - first) // width] += 1
        edges = tuple(first + i * width for i in range(n + 1))
        return cls(edges, tuple(counts), low, sorted(values)[(len(values) - 1) // 2], high)


def _round_width(least: int) -> int:
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10


@dataclass(frozen=True)
class Overlap:
    """What two files share, as (line here, line there): whole rows, and of the others prompts or answers."""

    rows: tuple[tuple[int, int], ...]
    prompts: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]


def overlap(here: Dataset, there: Dataset) -> Overlap:
    """Pairs of lines, white space and letter case aside. A row that is there whole is not counted again."""
    rows = _pairs(here.records, there.records, lambda record: record.key)
    whole = {line for line, _ in rows}
    others = [record for record in here.records if record.turns and record.line not in whole]
    asked = [record for record in there.records if record.turns]
    return Overlap(rows, _pairs(others, asked, prompt_key), _pairs(others, asked, _answer_key))


def _pairs(
    here: Sequence[Record], there: Sequence[Record], key: Callable[[Record], str]
) -> tuple[tuple[int, int], ...]:
    lines = {key(record): record.line for record in there}
    return tuple((record.line, lines[key(record)]) for record in here if key(record) in lines)


def _answer_key(record: Record) -> str:
    return folded(record.completion)


def prompt_key(record: Record) -> str:
    return "\x1f".join(folded(content) for _, content in record.turns)


def repeated_prompts(dataset: Dataset) -> int:
    """Rows whose prompt an earlier row has too, with another answer."""
    asked = [prompt_key(record) for record in dataset.records if record.turns]
    return len(asked) - len(set(asked))


def word_count(record: Record) -> int:
    """White-space separated words of the prompt and the answer together."""
    return sum(len(content.split()) for _, content in record.turns) + len(record.completion.split())
