"""The retain set of a run: rows to train on, rows held back, and corrected answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qunlearn.data.records import Record
from qunlearn.data.statistics import prompt_key
from qunlearn.data.tokenize import Example
from qunlearn.roles.self_made import SelfMade
from qunlearn.utils.text import folded


@dataclass(frozen=True)
class RetainSet:
    """Normal rows by use. `corrected`: other answers to bad prompts, by prompt; `made` is None where no row was made
    now; `covered`: share of the own rows that are like some row of the file, None without both."""

    retain: Sequence[Example]
    held_back: Sequence[Example]
    corrected: Mapping[str, Sequence[Example]]
    given: int
    own: int
    made: SelfMade | None = None
    covered: float | None = None

    @property
    def corrected_rows(self) -> int:
        return sum(len(rows) for rows in self.corrected.values())


def asked(record: Record) -> str:
    """Return what a row asks, or where there are no prompts says, letter case and white space aside."""
    return prompt_key(record) if record.turns else folded(record.completion)
