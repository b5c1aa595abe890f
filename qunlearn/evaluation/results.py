"""The results of an evaluation as the measures read them: rows, models, and what was found. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASE, ADAPTER, GUARDED, RETRAINED = "base", "adapter", "guarded", "retrained"
SPLITS = ("forget", "paraphrase", "retain", "holdout", "general")
KEPT = "kept"  # every split to keep, taken together


def after(subjects: Collection[str]) -> str:
    """Return the subject that is judged beside the base: the guarded model, else the adapter, else the base itself."""
    return next((subject for subject in (GUARDED, ADAPTER) if subject in subjects), BASE)


def is_forget(split: str) -> bool:
    """Return whether a split holds what should be gone, asked in whatever words."""
    return split == "paraphrase" or split.startswith("forget")


@dataclass(frozen=True)
class Item:
    """A row of a split. `truth` is what a wrong answer to forget should have been, where the file says so."""

    prompt: str
    answer: str
    truth: str | None = None

    @property
    def key(self) -> str:
        """Equal for the same row of another run, and nothing to read."""
        return hashlib.sha256(f"{self.prompt}\x1f{self.answer}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ChoiceScores:
    """Mean NLLs, in nats per token, of a row's right answer and of its wrong ones."""

    correct: float
    wrong: tuple[float, ...]


@dataclass(frozen=True)
class Fluency:
    """NLL of a row's output, behind its prompt, under the model that judges fluency."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class View:
    """Everything that was found: `found[subject, split, probe]` holds one value per item of the split, or None."""

    items: Mapping[str, Sequence[Item]]
    subjects: Sequence[str]
    found: Mapping[tuple[str, str, str], Sequence[Any]]

    def has(self, subject: str, split: str, *probes: str) -> bool:
        return all((subject, split, probe) in self.found for probe in probes)

    def get(self, subject: str, split: str, probe: str) -> Sequence[Any]:
        return self.found[subject, split, probe]
