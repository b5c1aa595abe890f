"""What was found about rows under models, as the measures see it. Data only: nothing here needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qunlearn.data.records import Record

BASE, ADAPTER, REFERENCE = "base", "adapter", "reference"
SPLITS = ("forget", "paraphrase", "retain", "holdout", "general")
KEPT = "kept"  # every split to keep, taken together
# Fields that public data sets use for what a measure needs besides prompt and answer.
_WRONG = ("perturbed", "perturbed_answer", "perturbed_answers", "wrong_answers", "Incorrect Answers")
_PARAPHRASED = ("paraphrased_answer",)
_TRUE = ("truth", "right_answer", "true_answer", "correct_answer")


def is_forget(split: str) -> bool:
    """Whether a split holds what should be gone, asked in whatever words."""
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
class Choices:
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


def wrong_answers(record: Record) -> tuple[str, ...]:
    """The row's perturbed or incorrect answers, none where it has none."""
    for name in _WRONG:
        value = record.meta.get(name)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(";")] if name == "Incorrect Answers" else [value]
        if isinstance(value, list):
            return tuple(text for text in value if isinstance(text, str) and text.strip())
    return ()


def paraphrased_answer(record: Record) -> str | None:
    """The right answer in other words, where the row has it."""
    return _first_text(record, _PARAPHRASED)


def true_answer(record: Record) -> str | None:
    """What is true, where the row's answer is the wrong one."""
    return _first_text(record, _TRUE)


def _first_text(record: Record, names: Sequence[str]) -> str | None:
    found = (record.meta.get(name) for name in names)
    return next((text for text in found if isinstance(text, str) and text.strip()), None)
