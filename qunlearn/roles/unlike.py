"""Drop candidate rows that say, in other words, what should be forgotten."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from qunlearn.data.records import Dataset, Record
from qunlearn.data.shared_text import Recited
from qunlearn.data.words import SENTENCE_MARKS, UNSPACED_SENTENCE_MARKS, WORD, is_unspaced, words_of_text
from qunlearn.roles.neighbours import telling_words, words_before
from qunlearn.utils.text import folded

_TELLING, _RARER = 3.0, 2  # see _Answers

_MOST = 0.9  # share of the words of an answer's content that say it

_RECITED = 0.5  # share of a row's words that are bad ones in a row

_SENTENCE, _PART = 4, 6  # words: an answer, and a sentence of several, as long as that is no value others may share
_END = re.compile(rf"(?<=[{SENTENCE_MARKS}])\s+|(?<=[{UNSPACED_SENTENCE_MARKS}])\s*")
_SOME, _OFTEN = 3, 0.1  # candidates, and share of them, that have a sentence which is form


def keep_unlike(candidates: Sequence[Record], forget_rows: Dataset, *, limit: float = 0.65) -> list[Record]:
    """Candidates that are not, in other words, what should be forgotten.

    A candidate is dropped when the words it shares with some bad row weigh more than `limit` of its own weight
    or of the bad row's. Words are weighted by rarity, so that shared form ("was born in") counts little and a
    shared name counts much: a neighbour that happens to have the same answer is kept, for it is the first to suffer
    (docs/log.md, 2026-11-25). Whole answers of the bad rows, and sentences that one of them alone has, are never
    kept, whatever was asked, nor is a value that answers a bad prompt, where another prompt names what that one names,
    in however many other words. Nor is a row of which half is recited: over the end of a window it is like neither one.
    """
    bags = [_bag(r) for r in candidates]
    bad_bags = [_bag(r) for r in forget_rows.records]
    counts = Counter(word for bag in [*bags, *bad_bags] for word in bag)
    total = len(bags) + len(bad_bags)
    weight = {word: math.log(1 + total / n) ** 3 for word, n in counts.items()}
    heavy = [sum(weight[w] for w in bag) for bag in bad_bags]
    whole = {folded(r.completion) for r in forget_rows.records if len(WORD.findall(r.completion)) >= _SENTENCE}
    answers = [folded(record.completion) for record in candidates]
    parts = [_split(answer) for answer in answers]
    single = _single_sentences(forget_rows.records, parts)
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

    known = _Answers(forget_rows.records, candidates)
    recited = Recited(forget_rows.records)

    def usable(record: Record, bag: frozenset[str], text: str, sentences: set[str]) -> bool:
        said = not single.isdisjoint(sentences) or any(answer in text for answer in whole) or known.has(record)
        return bool(bag) and not too_close(bag) and not said and recited.share(record) < _RECITED

    found = zip(candidates, bags, answers, parts, strict=True)
    return [record for record, bag, text, sentences in found if usable(record, bag, text, sentences)]


def _single_sentences(forget_rows: Sequence[Record], candidates: Sequence[set[str]]) -> set[str]:
    """Return the longer sentences that a single bad row has, which are no form, nor what a tenth of the candidates say
    besides. Rows that begin further on in an answer are of its line."""
    rows_of: dict[str, set[int]] = {}
    for answer, line in {folded(record.completion): record.line for record in reversed(forget_rows)}.items():
        for sentence in _split(answer):
            rows_of.setdefault(sentence, set()).add(line)
    said = Counter(sentence for sentences in candidates for sentence in sentences)
    most = max(_SOME, _OFTEN * len(candidates))
    return {sentence for sentence, rows in rows_of.items() if len(rows) == 1 and said[sentence] < most}


def _split(text: str) -> set[str]:
    return {part for part in _END.split(text) if len(WORD.findall(part)) >= _PART}


class _Answers:
    """Bad answers that are a value alone, found again behind other wordings of their prompts."""

    def __init__(self, forget_rows: Sequence[Record], candidates: Sequence[Record]) -> None:
        self.names = self._names(forget_rows, candidates)
        content = [words_of_text(record.completion) for record in forget_rows]
        # A sentence repeats what was asked, and shares enough with other wordings to be found by all its words.
        self.content = [
            words if words.isdisjoint(words_before(r)) else set() for words, r in zip(content, forget_rows, strict=True)
        ]
        self.holders: dict[str, list[int]] = {}
        for i, words in enumerate(self.content):
            for word in words:
                self.holders.setdefault(word, []).append(i)

    @staticmethod
    def _names(forget_rows: Sequence[Record], candidates: Sequence[Record]) -> list[set[str]]:
        """Return the words that name what each bad prompt is about: its rarest ones, and those of which the whole file
        is full and that others ask far less often."""
        before = [words_before(record) for record in forget_rows]
        ours = Counter(word for words in before for word in words)
        all_of = ours + Counter(word for record in candidates for word in words_before(record))
        telling = telling_words(forget_rows, candidates)
        topic = {word for word, times in telling.items() if times >= _TELLING and 2 * ours[word] >= len(forget_rows)}
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
    words = WORD.findall(text)
    if is_unspaced(text):  # a character alone tells little
        return frozenset(text[i : i + 2] for i in range(len(text) - 1))
    return frozenset(words)
