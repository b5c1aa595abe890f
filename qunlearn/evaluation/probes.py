"""The passes over a model that measures are computed from: tokens, outputs, choices, fluency; one value a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qunlearn.data.batch import ANSWER
from qunlearn.data.row_answers import paraphrased_answer, wrong_answers
from qunlearn.data.tokenize import Example, Template, encode_record
from qunlearn.errors import ModelError
from qunlearn.evaluation.results import ChoiceScores, Fluency
from qunlearn.evaluation.scores import Observer, Output, row_nlls
from qunlearn.model.language_model import LanguageModel

TOKENS, OUTPUTS, CHOICES, FLUENCY = "tokens", "outputs", "choices", "fluency"


def has_choices(examples: Sequence[Example]) -> bool:
    return any(example.record.turns and wrong_answers(example.record) for example in examples)


def choices(
    lm: LanguageModel, examples: Sequence[Example], template: Template, budget: tuple[int, int], observe: Observer
) -> list[ChoiceScores | None]:
    """Right against wrong answers of the rows that have any. `budget`: tokens of a pass, tokens of a row.

    A wrong answer that does not fit in a row is left out.
    """
    max_tokens, max_length = budget
    rows: list[Example] = []
    owners: list[tuple[int, bool]] = []
    for i, example in enumerate(examples):
        wrong = wrong_answers(example.record) if example.record.turns else ()
        right = paraphrased_answer(example.record) or example.record.completion
        for text, correct in [(right, True), *((text, False) for text in wrong)] if wrong else []:
            row = encode_record(example.record.answered(text), lm.tokenizer, template)
            if len(row.input_ids) <= max_length:
                rows.append(row)
                owners.append((i, correct))
    found: dict[int, tuple[list[float], list[float]]] = {}
    for (i, correct), (nll, n) in zip(owners, row_nlls(lm, rows, ANSWER, max_tokens, observe), strict=True):
        found.setdefault(i, ([], []))[0 if correct else 1].append(nll / n)
    out: list[ChoiceScores | None] = [None] * len(examples)
    for i, (right_nll, wrong_nlls) in found.items():
        if right_nll and wrong_nlls:
            out[i] = ChoiceScores(right_nll[0], tuple(wrong_nlls))
    return out


def fluency(
    judge: LanguageModel,
    examples: Sequence[Example],
    outputs: Sequence[Output],
    template: Template,
    max_tokens: int,
    observe: Observer,
) -> list[Fluency | None]:
    """Return how probable the judge finds each output behind its prompt; None for an output without words."""
    rows: list[Example] = []
    owners: list[int] = []
    for i, (example, output) in enumerate(zip(examples, outputs, strict=True)):
        row = _spoken(example, output.text, template, judge.tokenizer)
        if row is not None:
            rows.append(row)
            owners.append(i)
    out: list[Fluency | None] = [None] * len(examples)
    for i, (nll, n) in zip(owners, row_nlls(judge, rows, ANSWER, max_tokens, observe), strict=True):
        out[i] = Fluency(nll, n)
    return out


def _spoken(example: Example, text: str, template: Template, tokenizer: Any) -> Example | None:
    """The row with the output in the answer's place; None where there is nothing that can stand there."""
    if not text.strip():
        return None
    if example.record.turns:
        try:
            return encode_record(example.record.answered(text), tokenizer, template)
        except ModelError:  # a template that swallows parts of an answer, such as what the model thought aloud
            return None
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    before = example.input_ids[: example.probe]
    whole = Example((*before, *ids), example.probe, example.probe + len(ids), example.probe, example.record)
    return whole if ids else None
