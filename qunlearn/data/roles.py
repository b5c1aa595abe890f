"""What an objective needs besides the bad rows: mismatched answers, a held-back share, and a decency filter."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.data.borrowed import telling_words, words_before, words_of_text
from qunlearn.data.records import Dataset, Record
from qunlearn.data.tokenize import Example, Template, encode_record
from qunlearn.errors import DataError

_WORD = re.compile(r"\w+")
_HELD_BACK = 32  # rows that are held back at least, where there are four times as many
_TELLING, _RARER = 3.0, 2  # see _Answers
_MOST = 0.9  # share of the words of an answer's content that say it
_SENTENCE = 4  # words: an answer as long as that is no value that others may share


def split_held_back(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(trained on, held back): a seeded share of at least one row, whole records staying on one side."""
    order = sorted({id(example.record): example.record for example in examples}.values(), key=lambda r: r.line)
    if len(order) < 2:
        raise DataError("at least two rows of normal data are needed: one to train on, one to measure drift")
    random.Random(seed).shuffle(order)
    # Fewer would make drift the noise of single rows.
    n = max(1, round(share * len(order)), min(_HELD_BACK, len(order) // 4))
    held = {id(record) for record in order[:n]}
    inside = [example for example in examples if id(example.record) not in held]
    return inside, [example for example in examples if id(example.record) in held]


def sampled(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """Return at most `n` of the examples, drawn from the seed, in their order: a file may be sorted by topic."""
    if len(examples) <= n:
        return list(examples)
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), n))]


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
        own = _normal(example.record.completion)
        drawn: list[Example] = []
        for i in rng.sample(range(len(self.answers)), len(self.answers)):
            if len(drawn) == k:
                break
            if _normal(self.answers[i]) != own:
                drawn.append(self._pair(example, i))
        return drawn

    def longest(self, example: Example, k: int) -> list[Example]:
        """The pairs with the K longest answers: the most memory a draw can take."""
        order = sorted(range(len(self.pieces)), key=lambda i: -len(self.pieces[i]))
        return [self._pair(example, i) for i in order[:k]]

    def _pair(self, example: Example, i: int) -> Example:
        if example.record.turns:
            pair = self.encode(replace(example.record, completion=self.answers[i]))
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
    if len({_normal(a) for a in answers}) < 2:
        raise DataError("the normal data has fewer than two different answers to mismatch with")

    def encode(record: Record) -> Example:
        return encode_record(record, tokenizer, template)

    return Mismatcher(tuple(answers), tuple(pieces), encode, max_length)


def batches(n: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches of row numbers, each row once per epoch; the last batch of an epoch borrows from the next."""
    queue: list[int] = []
    while True:
        while len(queue) < size:
            epoch = list(range(n))
            rng.shuffle(epoch)
            queue += epoch
        yield queue[:size]
        queue = queue[size:]


def keep_unlike(candidates: Sequence[Record], bad: Dataset, *, limit: float = 0.65) -> list[Record]:
    """Candidates that are not, in other words, what should be forgotten.

    A candidate is dropped when the words it shares with some bad row weigh more than `limit` of its own weight
    or of the bad row's. Words are weighted by rarity, so that shared form ("was born in") counts little and a
    shared name counts much: a neighbour that happens to have the same answer is kept, for it is the first to suffer
    (docs/log.md, 2026-11-25). Whole sentences of the bad rows are never kept, whatever was asked, nor is a value
    that answers a bad prompt, where another prompt names what that one names, in however many other words.
    """
    bags = [_bag(r) for r in candidates]
    bad_bags = [_bag(r) for r in bad.records]
    counts = Counter(word for bag in [*bags, *bad_bags] for word in bag)
    total = len(bags) + len(bad_bags)
    weight = {word: math.log(1 + total / n) ** 3 for word, n in counts.items()}
    heavy = [sum(weight[w] for w in bag) for bag in bad_bags]
    sentences = {_normal(r.completion) for r in bad.records if len(_WORD.findall(r.completion)) >= _SENTENCE}
    holders: dict[str, list[int]] = {}
    for i, bag in enumerate(bad_bags):
        for word in bag:
            holders.setdefault(word, []).append(i)

    def too_close(bag: frozenset[str]) -> bool:
        shared: Counter[int] = Counter()
        for word in bag:
            for i in holders.get(word, ()):
                shared[i] += weight[word]  # type: ignore[assignment]
        own = sum(weight[w] for w in bag)
        return any(s > limit * min(own, heavy[i]) for i, s in shared.items())

    known = _Answers(bad.records, candidates)

    def usable(record: Record, bag: frozenset[str]) -> bool:
        text = _normal(record.completion)
        said = any(sentence in text for sentence in sentences) or known.has(record)
        return bool(bag) and not too_close(bag) and not said

    return [r for r, bag in zip(candidates, bags, strict=True) if usable(r, bag)]


class _Answers:
    """Bad answers that are a value alone, found again behind other wordings of their prompts."""

    def __init__(self, bad: Sequence[Record], candidates: Sequence[Record]) -> None:
        self.names = self._names(bad, candidates)
        content = [words_of_text(record.completion) for record in bad]
        # A sentence repeats what was asked, and shares enough with other wordings to be found by all its words.
        self.content = [
            words if words.isdisjoint(words_before(r)) else set() for words, r in zip(content, bad, strict=True)
        ]
        self.holders: dict[str, list[int]] = {}
        for i, words in enumerate(self.content):
            for word in words:
                self.holders.setdefault(word, []).append(i)

    @staticmethod
    def _names(bad: Sequence[Record], candidates: Sequence[Record]) -> list[set[str]]:
        """Return the words that name what each bad prompt is about: its rarest ones, and those of which the whole file
        is full and that others ask far less often."""
        before = [words_before(record) for record in bad]
        ours = Counter(word for words in before for word in words)
        all_of = ours + Counter(word for record in candidates for word in words_before(record))
        telling = telling_words(bad, candidates)
        topic = {word for word, times in telling.items() if times >= _TELLING and 2 * ours[word] >= len(bad)}
        least = [min((all_of[word] for word in words), default=0) for words in before]
        return [
            {word for word in words if word in topic or all_of[word] <= _RARER * n}
            for words, n in zip(before, least, strict=True)
        ]

    def has(self, record: Record) -> bool:
        """Return whether a record gives a bad answer to a prompt that names the same."""
        shared = Counter(i for word in words_of_text(record.completion) for i in self.holders.get(word, ()))
        names = words_before(record)
        return any(n >= _MOST * len(self.content[i]) and not names.isdisjoint(self.names[i]) for i, n in shared.items())


def _bag(record: Record) -> frozenset[str]:
    text = f"{record.prompt} {record.completion}".casefold()
    words = _WORD.findall(text)
    if words and sum(map(len, words)) / len(words) > 12:  # a script without spaces: pairs of characters
        return frozenset(text[i : i + 2] for i in range(len(text) - 1))
    return frozenset(words)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
