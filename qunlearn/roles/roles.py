"""The data of a run by role: forget, retain, held back, and the answers taught instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qunlearn.data.tokenize import Example
from qunlearn.evaluation.metrics.manner import Phrase
from qunlearn.roles.mismatch import Mismatcher


@dataclass(frozen=True)
class Reserved:
    """A bad row in other words: its place among the forget examples, that of its row, and as looks see it."""

    place: int
    of: int
    watched: Example


@dataclass(frozen=True)
class Roles:
    """The data of a run by role. `held_back` is normal data that is never trained on: drift is measured there.

    `alternatives` are other answers for each forget example, in their order, where the objective wants any; `instead`
    what may be said in its place, and `taught` what is to be, where anything is. `marked` are the forget examples that
    the looks of the loop are at, with the weights of what is specific to them; without any, all forget examples are.
    `starts` are, for each bad row, the places among `forget` of the row and of its variants, one of which each step
    draws; without any, every forget example is a row of its own. `phrases` are what a behaviour says, where the bad
    file is of one. `reserve` are bad rows in other words, which are drawn once they have come back.
    """

    forget: Sequence[Example]
    retain: Sequence[Example]
    held_back: Sequence[Example]
    mismatcher: Mismatcher
    alternatives: Sequence[Sequence[Example]] = ()
    instead: Sequence[Sequence[Example]] = ()
    taught: Sequence[Sequence[Example]] = ()
    marked: Sequence[Example] = ()
    starts: Sequence[Sequence[int]] = ()
    phrases: frozenset[Phrase] = frozenset()
    reserve: Sequence[Reserved] = ()

    @property
    def rows(self) -> int:
        """Return how many bad rows an epoch goes through."""
        return len(self.starts or self.forget)

    @property
    def watched(self) -> Sequence[Example]:
        """Return the examples for early stopping: form that stays probable would hide what is gone, and vice versa."""
        return self.marked or self.forget
