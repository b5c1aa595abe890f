"""Begin passages further on: a text that is known by heart is recited from any of its sentences.

They are rows like those of the file: weighed, pushed and looked at alike, and the base's own rows that recite one of
them are not kept. Each step draws a passage from one of its beginnings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.data.records import Dataset, Record
from qunlearn.data.tokenize import PASSAGE, Encoded, Example, Template, encode_record, encode_text
from qunlearn.data.words import SENTENCE_MARKS, UNSPACED_SENTENCE_MARKS, pieces
from qunlearn.evaluation.scores import row_probabilities
from qunlearn.model.policy import Policy

_MOST, _IN_ALL = 3, 1800  # later beginnings of a passage, spread over it; in a file, but for one each
_LEAST = 8  # tokens that a beginning leaves to recite
_AS_WELL = 0.5  # probability per token of a later row, over that of the whole, from which the base recites it
_SPACE = re.compile(r"(?<=\S)\s+(?=\S)")
_QUESTION = ("?", "？", ":", "：")
_ENDS = re.compile(rf"[{SENTENCE_MARKS}{UNSPACED_SENTENCE_MARKS}]['\"’”»)\]」』）】》]*")
_BREAK = re.compile(rf"(?<=\S)(?:{_ENDS.pattern}(?:\s+|(?<=[。！？’”」』）】》]))|\s*\n\s*)(?=\S)")


@dataclass(frozen=True)
class Variants:
    """Rows that lead to a bad answer in another way, and for each the place of its bad row: passages begun further on,
    long answers in other words."""

    rows: tuple[Example, ...] = ()
    of: tuple[int, ...] = ()

    def and_also(self, others: Sequence[tuple[Example, int]]) -> Variants:
        """Return these with other rows behind them, each with the place of its bad row."""
        rows, of = tuple(row for row, _ in others), tuple(i for _, i in others)
        return replace(self, rows=(*self.rows, *rows), of=(*self.of, *of))

    def with_rows(self, forget_rows: Encoded) -> Encoded:
        """Return the file's rows with these behind them."""
        return replace(forget_rows, examples=(*forget_rows.examples, *self.rows))

    def with_records(self, forget_rows: Dataset, rows: Sequence[Example]) -> Dataset:
        """Return the file with a record for each of its rows, of a long text for each window, and these behind them."""
        return replace(forget_rows, records=tuple(row.record for row in (*rows, *self.rows)))

    def starts(self, kept: Sequence[int], rows: int) -> list[tuple[int, ...]]:
        """Return for each row, of the places that are kept, which are it and its variants, as numbers into these; none
        where no variant is kept. The first `rows` places are the file's."""
        found: dict[int, list[int]] = {}
        for n, place in enumerate(kept):
            found.setdefault(place if place < rows else self.of[place - rows], []).append(n)
        return [tuple(numbers) for numbers in found.values()] if len(found) < len(kept) else []


def later_starts(
    policy: Policy, forget_rows: Sequence[Example], template: Template, limit: int, length: int
) -> Variants:
    """Return rows that begin at later sentences or lines of the passages, where the base goes on with them as it does
    from their beginning.

    Where a row has a prompt, the passage takes its place, as many words of it; unless it asks. `limit` are the most
    tokens of a pass, `length` those of a row.
    """
    passages = [i for i, example in enumerate(forget_rows) if is_recited(example)]
    most = max(1, min(_MOST, _IN_ALL // max(1, len(passages))))
    every = []
    for i in passages:
        starts, middle = beginnings(forget_rows[i], policy.tokenizer, template, length)
        every += [(row, i) for row in starts[:: max(1, -(-len(starts) // most))] or middle]
    with policy.reference():
        whole = dict(zip(passages, row_probabilities(policy, [forget_rows[i] for i in passages], limit), strict=True))
        later = row_probabilities(policy, [row for row, _ in every], limit)
    found = [(row, i) for (row, i), p in zip(every, later, strict=True) if p > _AS_WELL * whole[i]]
    return Variants(tuple(row for row, _ in found), tuple(i for _, i in found))


def is_recited(example: Example) -> bool:
    """Return whether a row is a passage that may be asked for from any of its places: a long one behind no question."""
    asks = example.record.turns and example.record.prompt.rstrip().endswith(_QUESTION)
    return example.end - example.start >= PASSAGE and not asks


def beginnings(
    example: Example, tokenizer: Any, template: Template, length: int
) -> tuple[list[Example], list[Example]]:
    """Return the row from later sentences or lines on, and from its middle, where that is something else."""
    record = example.record
    text = record.completion if record.turns else record.completion.strip()
    starts = [found.end() for found in _BREAK.finditer(text)]
    if record.turns:  # the answer itself begins further on
        starts = [len(text) - len(text.lstrip()), *starts]
    words = [found.end() for found in _SPACE.finditer(text)]
    middle = [at for at in words[len(words) // 2 :] if at not in starts][:1]

    def begun(places: Sequence[int]) -> list[Example]:
        rows = (_encoded(_begun(record, text[at:]), tokenizer, template, length) for at in places)
        return [row for row in rows if row is not None]

    return begun(starts), begun(middle)


def _begun(record: Record, rest: str) -> Record:
    """The record asking with the beginning of the rest, about as long as its own prompt, for what follows it."""
    if not record.turns:
        return replace(record, completion=rest)
    words = max(1, min(len(pieces(record.prompt)), len(pieces(rest)) // 2))
    at = _end_of(rest, words)
    if _ENDS.search(record.prompt.rstrip()[-2:]):  # a prompt of whole sentences
        at = next((found.end() for found in _ENDS.finditer(rest, at - 1)), at)
    *earlier, (role, _) = record.turns
    answer = rest[at:] if record.completion[:1].isspace() else rest[at:].lstrip()
    return replace(record, turns=(*earlier, (role, rest[:at])), completion=answer)


def _end_of(text: str, words: int) -> int:
    """Return where the first so many pieces of a text end."""
    at = 0
    for piece in pieces(text)[:words]:
        at = text.index(piece, at) + len(piece)
    return at


def _encoded(record: Record, tokenizer: Any, template: Template, length: int) -> Example | None:
    """The record as tokens; None where it leaves too little to recite, or is too long."""
    if not record.completion.strip():
        return None
    if record.turns:
        row = encode_record(record, tokenizer, template)
    elif texts := encode_text(record, tokenizer, length):
        row = texts[0]
    else:
        return None
    return row if row.end - row.start >= _LEAST and len(row.input_ids) <= length else None
