"""The gate's lexical view: which words, and pairs of words near each other, speak for a bad prompt. No torch here.

Weights are never negative, so that no text around a name can hide it; texts are read in windows, so that a long one
does not add up to a topic. A word that neither a text to learn from nor the base's vocabulary has is read as the
telling word that it is a slip of.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from re import Match

import numpy as np
from numpy.typing import NDArray

from qunlearn.data.words import WORD
from qunlearn.evaluation.metrics.logistic import balanced, logistic

_APART = 3  # words from one to the other of a pair, at most
_WINDOW, _STRIDE = 12, 6  # words
_DECAY = 1e-3
_GRAM = 4  # letters of a part of a word
_SHORTEST = 4  # letters of a word from which it is known with a slip in it: shorter ones are too like each other
_LONGER, _ENOUGH_WORDS = 5, 5_000  # the same beside a vocabulary of fewer words: it lacks common ones
_QUOTED = 10  # words in a row of a bad answer, that no row to pass has, by which a text quotes it
_REMEMBERED, _TEXTS = 1 << 16, 1 << 13  # hashes, and texts' n-grams, that are kept

# Signs that are not seen and that Unicode counts among letters and marks, not among format characters.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")

Span = tuple[int, int]


@dataclass(frozen=True)
class Vocabulary:
    """Words that are no slips of telling ones, though they look like it; and how many letters a word has at least that
    is known with a slip in it."""

    words: frozenset[str] = frozenset()
    shortest: int = _SHORTEST

    @classmethod
    def of(cls, known: Iterable[str], bad: Sequence[str]) -> Vocabulary:
        """Return what a base's words tell about the bad texts: "will" is no slip of "mill"."""
        known = frozenset(known)
        keys = {key for word in distinct_words(bad) for key in _left(word)}
        like = frozenset(word for word in known if any(key in keys for key in _left(word)))
        return cls(like, _SHORTEST if len(known) >= _ENOUGH_WORDS else _LONGER)


_NONE = Vocabulary()


@dataclass(frozen=True)
class Lexicon:
    """Hashes of n-grams in rising order, (N,) int64, and their weights, (N,) float32, none negative.

    slips: hashes of what is left of telling words without one letter, (M,) int64, in rising order; meant: the hash of
    the word that each is left of, (M,); own: hashes of words that are read as they are, though they look like slips;
    parts: hashes of the parts of telling words, (P,), and wholes: of the word that each is part of, (P,).
    quotes: hashes of runs of words of bad answers, (Q,).
    """

    keys: NDArray[np.int64]
    weights: NDArray[np.float32]
    slips: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    meant: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    own: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    parts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    wholes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    quotes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @cached_property
    def _quotes(self) -> frozenset[int]:
        return frozenset(self.quotes.tolist())

    @cached_property
    def _meant(self) -> dict[int, int]:
        return dict(zip(self.slips.tolist(), self.meant.tolist(), strict=True))

    @cached_property
    def _own(self) -> frozenset[int]:
        return frozenset((*self.own.tolist(), *self.meant.tolist()))

    @cached_property
    def _parts(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for part, whole in zip(self.parts.tolist(), self.wholes.tolist(), strict=True):
            found.setdefault(whole, []).append(part)
        return found

    def known(self, word: str) -> tuple[int, Sequence[int]]:
        """Return the hashes of a folded word and of its parts, or of those of the telling word that it is a slip of."""
        read = self.read(word)
        return (read, _parts(word)) if read == _hashed(word) else (read, self._parts.get(read, ()))

    def read(self, word: str) -> int:
        """Return the hash of a folded word, or of the telling word that it is a slip of."""
        own = _hashed(word)
        if not self._meant or own in self._own:
            return own
        return next((self._meant[key] for key in _left(word) if key in self._meant), own)

    def score(self, text: str) -> float:
        """Return the weight of the n-grams in the worst window of the text as it stands or in plain letters; infinity
        for a text that quotes a bad answer."""
        return max(self._score(read) for read in {text, undisguised(text)})

    def _score(self, text: str) -> float:
        if self._quotes and not self._quotes.isdisjoint(_runs(text)):
            return math.inf
        return max((sum(found.values()) for found, _ in self._windows(text)), default=0.0)

    def telling(self, text: str) -> list[Span]:
        """Return where the n-grams stand that weigh at least half of the heaviest one; nothing of a text that tells
        more in plain letters."""
        if self.score(text) > self._score(text):
            return []
        spans: list[Span] = []
        for found, places in self._windows(text):
            most = max(found.values(), default=0.0)
            spans += [span for key, value in found.items() if 2 * value >= most > 0 for span in places[key]]
        return sorted(set(spans))

    def _windows(self, text: str) -> Iterator[tuple[dict[int, float], dict[int, list[Span]]]]:
        """Yield the weights of each window's n-grams, and their places in the text."""
        for words in _windowed(list(WORD.finditer(text))):
            places: dict[int, list[Span]] = {}
            for key, spans in _ngrams(words, self.known):
                places.setdefault(key, []).extend(spans)
            keys = np.fromiter(places, np.int64, len(places))
            at = np.searchsorted(self.keys, keys).clip(max=max(0, len(self.keys) - 1))
            known = self.keys[at] == keys if len(self.keys) else np.zeros(len(keys), bool)
            yield {int(k): float(w) for k, w in zip(keys[known], self.weights[at[known]], strict=True)}, places


def fit_lexicon(bad: Sequence[str], normal: Sequence[str], vocabulary: Vocabulary = _NONE) -> Lexicon:
    """Return the lexicon that tells texts to flag from those to pass. An n-gram of no bad text would have no weight."""
    from scipy.sparse import csr_matrix

    found = [_keys_of(text) for text in (*bad, *normal)]
    keys = np.unique(np.concatenate([np.empty(0, np.int64), *found[: len(bad)]]))
    places = [np.searchsorted(keys, grams).clip(max=max(0, len(keys) - 1)) for grams in found]
    columns = [at[keys[at] == grams] if len(keys) else at[:0] for at, grams in zip(places, found, strict=True)]
    ends = np.cumsum([0, *map(len, columns)])
    together = np.concatenate([np.empty(0, np.int64), *columns])
    x = csr_matrix((np.ones(ends[-1]), together, ends), shape=(len(found), len(keys)))
    labels = np.repeat([1.0, 0.0], [len(bad), len(normal)])
    weights, _ = logistic(x, labels, balanced(labels), _DECAY, nonnegative=True)
    kept = weights > 1e-4
    told = {int(key): float(weight) for key, weight in zip(keys[kept], weights[kept], strict=True)}
    return Lexicon(keys[kept], weights[kept].astype(np.float32), *_slips([*bad, *normal], told, vocabulary))


def undisguised(text: str) -> str:
    """Return a text in plain letters: fullwidth and mathematical ones in their usual form (NFKC), "_" as a space, and
    signs that nobody sees left out, the joiners of letters among them."""
    plain = text.replace("_", " ")
    if plain.isascii():
        return plain
    seen = _UNSEEN.sub("", unicodedata.normalize("NFKC", plain))
    return "".join(sign for sign in seen if unicodedata.category(sign) != "Cf")


def quotes_of(bad: Iterable[str], normal: Iterable[str]) -> NDArray[np.int64]:
    """Return the hashes, in rising order, of ten words in a row that bad answers have and no text to pass has."""
    passing = {key for text in normal for key in _runs(text)}
    return np.array(sorted({key for text in bad for key in _runs(text)} - passing), np.int64)


def _runs(text: str) -> set[int]:
    words = [match.group().casefold() for match in WORD.finditer(text)]
    return {_hashed(" ".join(words[at : at + _QUOTED])) for at in range(len(words) - _QUOTED + 1)}


def _slips(texts: Sequence[str], told: Mapping[int, float], vocabulary: Vocabulary) -> Iterator[NDArray[np.int64]]:
    """Yield what is left of the telling words; the words meant, the heaviest where several are; the words of the texts
    and of the vocabulary that look like slips of them; the telling words' parts, and what each is part of.

    What a telling word begins with is no word of the vocabulary: it may be a token that such words are made of.
    """
    words = distinct_words(texts)
    telling = sorted((word for word in words if _hashed(word) in told), key=lambda word: (told[_hashed(word)], word))
    meant = {key: word for word in telling if len(word) >= vocabulary.shortest for key in _left(word)}
    own = {word for word in words if any(key in meant for key in _left(word))}
    own |= {w for w in vocabulary.words if any(k in meant and not meant[k].startswith(w) for k in _left(w))}
    slips = sorted(meant)
    parts = sorted((part, _hashed(word)) for word in set(meant.values()) for part in _parts(word))
    hashes = ([_hashed(meant[key]) for key in slips], sorted(map(_hashed, own)))
    for part in (slips, *hashes, [p for p, _ in parts], [whole for _, whole in parts]):
        yield np.array(part, np.int64)


def distinct_words(texts: Iterable[str]) -> set[str]:
    """Return the words of texts, casefolded."""
    return {match.group().casefold() for text in texts for match in WORD.finditer(text)}


@lru_cache(_TEXTS)
def _keys_of(text: str) -> NDArray[np.int64]:
    """The hashes of a text's n-grams in rising order: every fold learns from most texts again."""
    return np.array(sorted(grams_of(text)), np.int64)


def grams_of(text: str) -> set[int]:
    """Return the hashes of a text's n-grams."""
    return {key for key, _ in _ngrams(list(WORD.finditer(text)))}


def _windowed(words: list[Match[str]]) -> Iterator[list[Match[str]]]:
    for at in range(0, max(1, len(words) - (_WINDOW - _STRIDE)), _STRIDE):
        yield words[at : at + _WINDOW]


def _ngrams(
    words: Sequence[Match[str]], known: Callable[[str], tuple[int, Sequence[int]]] | None = None
) -> Iterator[tuple[int, tuple[Span, ...]]]:
    """Yield each word, part of a word, and pair of words near each other, as a hash; and where it stands.

    known: gives a word its hash and those of its parts; left out, they are the word's own.
    """
    folded = [match.group().casefold() for match in words]
    hashes = [(_hashed(word), _parts(word)) if known is None else known(word) for word in folded]
    for i, (word, parts) in enumerate(hashes):
        for key in (word, *parts):
            yield key, (words[i].span(),)
        for j in range(i + 1, min(i + 1 + _APART, len(words))):
            yield _pair(word, hashes[j][0]), (words[i].span(), words[j].span())


@lru_cache(_REMEMBERED)
def _parts(word: str) -> tuple[int, ...]:
    """Hashes of the parts of a word."""
    marked = f"<{word}>"
    starts = range(len(marked) - _GRAM + 1) if len(word) >= _GRAM else range(0)
    return tuple(_hashed("#" + marked[at : at + _GRAM]) for at in starts)


@lru_cache(_REMEMBERED)
def _pair(first: int, second: int) -> int:
    """The hash of two words near each other, from theirs."""
    return _hashed(f"{first} {second}")


@lru_cache(_REMEMBERED)
def _left(word: str) -> tuple[int, ...]:
    """Hashes of a word, and of what is left of it when one letter is lost: two words that differ by one slip (a letter
    lost, added or changed, or two that change places) share one of these. Source: symmetric deletion, Garbe 2012."""
    if len(word) < _SHORTEST:
        return ()
    ways = dict.fromkeys((word, *(word[:at] + word[at + 1 :] for at in range(len(word)))))
    return tuple(_hashed("~" + left) for left in ways)


@lru_cache(_REMEMBERED)
def _hashed(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
