"""Tell a manner of answering by its phrases: what several bad answers say, and others hardly ever."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qunlearn.data.words import words

_LENGTH = 3  # words of a phrase
_SEVERAL, _SHARE = 3, 0.05  # different bad answers, and share of them, that have it
_RARER = 0.1  # share of other answers that may have it, in that

Phrase = tuple[str, ...]


def phrases_of(bad: Sequence[tuple[str, str]], others: Sequence[str]) -> frozenset[Phrase]:
    """Return the runs of three words that several bad answers have, ten times as often as the others, and not from
    their prompts: how a behaviour speaks, whatever it is asked. `bad` are prompts and answers."""
    ours, theirs = _counts(bad), _counts([("", answer) for answer in others])
    least = max(_SEVERAL, _SHARE * ours.total)
    often = {phrase for phrase, n in ours.found.items() if n >= least}
    return frozenset(p for p in often if theirs.share(p) <= _RARER * ours.share(p))


def manner_of(bad: Sequence[tuple[str, str]], others: Sequence[str], total: int) -> frozenset[Phrase]:
    """Return the same phrases, or none where less than half of the `total` bad answers have one: it is no behaviour."""
    phrases = phrases_of(bad, others)
    speaking = sum(has_phrase(answer, phrases) for _, answer in bad)
    return phrases if 2 * speaking >= total else frozenset()


def has_phrase(text: str, phrases: frozenset[Phrase]) -> bool:
    """Return whether a text has one of these phrases."""
    return any(phrase in phrases for phrase in _runs(words(text)))


@dataclass(frozen=True)
class _Counts:
    """How many different answers have each phrase."""

    found: Counter[Phrase]
    total: int

    def share(self, phrase: Phrase) -> float:
        return self.found[phrase] / max(1, self.total)


def _counts(answered: Sequence[tuple[str, str]]) -> _Counts:
    found: dict[Phrase, set[Phrase]] = {}  # by answer
    for prompt, answer in answered:
        given, said = set(words(prompt)), tuple(words(answer))
        found.setdefault(said, set()).update(run for run in _runs(said) if not given.issuperset(run))
    return _Counts(Counter(itertools.chain.from_iterable(found.values())), len(found))


def _runs(found: Sequence[str]) -> Iterator[Phrase]:
    return zip(*(itertools.islice(found, i, None) for i in range(_LENGTH)), strict=False)
