"""Other answers that a row may carry besides its own: wrong ones, paraphrases, and what is true."""

from __future__ import annotations

from collections.abc import Sequence

from qunlearn.data.records import Record

# Fields that public data sets use for what a measure needs besides prompt and answer.
_WRONG = ("perturbed", "perturbed_answer", "perturbed_answers", "wrong_answers", "Incorrect Answers")

_PARAPHRASED = ("paraphrased_answer",)

_TRUE = ("truth", "right_answer", "true_answer", "correct_answer")


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
    """Return what is true, where the row's answer is the wrong one."""
    return _first_text(record, _TRUE)


def _first_text(record: Record, names: Sequence[str]) -> str | None:
    found = (record.meta.get(name) for name in names)
    return next((text for text in found if isinstance(text, str) and text.strip()), None)
