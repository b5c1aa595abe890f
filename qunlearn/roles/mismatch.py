"""Draw mismatched answers from the retain set for a bad prompt (LLMU's random answers)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, encode_record
from qunlearn.errors import DataError
from qunlearn.utils.text import folded


@dataclass(frozen=True)
class Mismatcher:
    """Draws K answers from the normal data for a bad prompt, never the row's own (LLMU's Y_rdn).

    `answers` are texts; `pieces` the same as token ids, for bad rows that are plain text.
    """

    answers: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]
    encode: Callable[[Record], Example]
    max_length: int

    def draw(self, example: Example, k: int, rng: random.Random) -> list[Example]:
        own = folded(example.record.completion)
        drawn: list[Example] = []
        for i in rng.sample(range(len(self.answers)), len(self.answers)):
            if len(drawn) == k:
                break
            if folded(self.answers[i]) != own:
                drawn.append(self._pair(example, i))
        return drawn

    def longest(self, example: Example, k: int) -> list[Example]:
        """The pairs with the K longest answers: the most memory a draw can take."""
        order = sorted(range(len(self.pieces)), key=lambda i: -len(self.pieces[i]))
        return [self._pair(example, i) for i in order[:k]]

    def _pair(self, example: Example, i: int) -> Example:
        if example.record.turns:
            pair = self.encode(example.record.answered(self.answers[i]))
            if pair.start > example.start:  # the row's prompt was cut to fit
                ids = example.input_ids[: example.start] + pair.input_ids[pair.start :]
                pair = Example(ids, example.start, pair.end - pair.start + example.start, example.probe, pair.record)
        else:
            ids = example.input_ids[: example.probe] + self.pieces[i]
            pair = Example(ids, example.probe, len(ids), example.probe, example.record)
        # A long answer behind a long prompt is cut at the end: its beginning is what mismatches.
        ids = pair.input_ids[: self.max_length]
        end = min(pair.end, len(ids))
        return replace(pair, input_ids=ids, end=end)


def _encodes_nothing(record: Record) -> Example:
    raise ValueError("there is nothing to mismatch with")


NO_MISMATCH = Mismatcher((), (), _encodes_nothing, 0)


def make_mismatcher(retain: Sequence[Example], tokenizer: Any, template: Template, max_length: int) -> Mismatcher:
    """A mismatcher over the answers of the normal rows; of plain text the second halves serve as answers."""
    answers, pieces = [], []
    for example in retain:
        ids = example.input_ids[example.probe : example.end]
        text = example.record.completion if example.record.turns else tokenizer.decode(list(ids))
        if text.strip():
            answers.append(text)
            pieces.append(tuple(ids))
    if len({folded(a) for a in answers}) < 2:
        raise DataError("the normal data has fewer than two different answers to mismatch with")

    def encode(record: Record) -> Example:
        return encode_record(record, tokenizer, template)

    return Mismatcher(tuple(answers), tuple(pieces), encode, max_length)
