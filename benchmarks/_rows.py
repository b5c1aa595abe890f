"""The rows of a step: ragged as real ones are, drawn from a seed, as token ids."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example

_RECORD = Record(turns=(), completion="", line=0, meta={})
_SPECIAL = 3  # ids below are special tokens: padding, beginning, end
_END = 2


@dataclass(frozen=True)
class Lengths:
    """Prompts are uniform between two bounds, answers log-normal and clipped: many short ones, a long tail."""

    prompt: tuple[int, int] = (20, 60)
    answer: tuple[int, int] = (10, 80)
    answer_median: float = 28.0
    answer_spread: float = 0.6

    def draw_prompt(self, rng: random.Random) -> int:
        return rng.randint(*self.prompt)

    def draw_answer(self, rng: random.Random) -> int:
        n = round(math.exp(rng.gauss(math.log(self.answer_median), self.answer_spread)))
        return min(max(n, self.answer[0]), self.answer[1])


@dataclass(frozen=True)
class Rows:
    """One step by role. `mismatch` holds K rows for each row of `forget`, in its order and with its prompt."""

    forget: tuple[Example, ...]
    mismatch: tuple[Example, ...]
    retain: tuple[Example, ...]

    @property
    def row_tokens(self) -> int:
        """Tokens when every answer has a row of its own."""
        return sum(len(e.input_ids) for e in (*self.forget, *self.mismatch, *self.retain))

    @property
    def shared_tokens(self) -> int:
        """Tokens when a prompt stands once before all its answers."""
        repeated = sum(e.start for e in self.mismatch)
        return self.row_tokens - repeated


class Drawer:
    """Draws rows of one vocabulary from a seed."""

    def __init__(self, vocabulary: int, seed: int, lengths: Lengths | None = None) -> None:
        self.vocabulary, self.rng, self.lengths = vocabulary, random.Random(seed), lengths or Lengths()

    def ids(self, n: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(_SPECIAL, self.vocabulary) for _ in range(n))

    def row(self, prompt: Sequence[int] | None = None, answer: Sequence[int] | None = None) -> Example:
        prompt = self.ids(self.lengths.draw_prompt(self.rng)) if prompt is None else prompt
        answer = self.ids(self.lengths.draw_answer(self.rng)) if answer is None else answer
        ids = (*prompt, *answer, _END)
        return Example(ids, len(prompt), len(ids) - 1, len(prompt), _RECORD)

    def step(self, bad: int, normal: int, k: int) -> Rows:
        """`bad` rows, K mismatched answers, the same for each of them as in the published script, `normal` rows."""
        forget = tuple(self.row() for _ in range(bad))
        answers = [self.ids(self.lengths.draw_answer(self.rng)) for _ in range(k)]
        mismatch = tuple(self.row(e.input_ids[: e.start], answer) for e in forget for answer in answers)
        return Rows(forget, mismatch, tuple(self.row() for _ in range(normal)))

    def step_of(self, tokens: int, k: int) -> Rows:
        """A step of exactly `tokens` tokens, prompts counted once.

        One normal row for each bad one, and normal rows for what is left.
        Raises ValueError when `tokens` is too few for one row of each kind.
        """
        rows = Rows((), (), ())
        while True:
            more = self.step(1, 1, k)
            grown = Rows(rows.forget + more.forget, rows.mismatch + more.mismatch, rows.retain + more.retain)
            if grown.shared_tokens > tokens:
                break
            rows = grown
        if not rows.retain:
            raise ValueError(f"{tokens} tokens do not hold a bad row, {k} mismatched answers and a normal row")
        rest = tokens - rows.shared_tokens
        filled = list(rows.retain)
        while rest > 0:
            n = min(rest, self.lengths.prompt[0] + self.lengths.answer[1])
            if n < 8:  # too short for a row of its own
                last = filled[-1]
                filled[-1] = self.row(last.input_ids[: last.start], last.input_ids[last.start : last.end] + self.ids(n))
            else:
                prompt = n // 2
                filled.append(self.row(self.ids(prompt), self.ids(n - prompt - 1)))
            rest -= n
        return Rows(rows.forget, rows.mismatch, tuple(filled))

    def plain(self, tokens: int) -> list[Example]:
        """Rows for fine-tuning, `tokens` tokens in all, the last one cut or filled up to make it exact."""
        out: list[Example] = []
        left = tokens
        while left > 0:
            row = self.row()
            n = len(row.input_ids)
            if left - n < 8:
                prompt = max(1, left // 2)
                row = self.row(self.ids(prompt), self.ids(max(0, left - prompt - 1)))
                n = left
            out.append(row)
            left -= n
        return out
