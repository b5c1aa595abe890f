"""Make placebo facts: of the same shape, about subjects that do not exist, and so never taught to any model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qunlearn.attack.facts import Fact, form_of, subject_names
from qunlearn.data.records import Record, at_once
from qunlearn.data.words import WORD, between, is_unspaced, pieces

_TRIES = 64


@dataclass(frozen=True)
class Placebos:
    """As many facts as there are rows, in their order. `renamed`: how many ask about another subject; the others ask
    what the row asks, and have another answer."""

    facts: tuple[Fact, ...]
    renamed: int


def make_placebos(facts: Sequence[Fact], others: Sequence[Record], seed: int) -> Placebos:
    """Return a placebo for each fact, drawn from the seed: the subject's name put together from other subjects' names,
    the answer drawn evenly from the right one and the wrong ones.

    A model that never learnt the facts is no likelier to give a fact's answer than its placebo's.
    """
    rng = random.Random(f"placebo {seed}")
    records = [fact.record for fact in facts]
    rows = [*records, *others]
    found = subject_names(rows)
    forms = [form_of(at_once(row), name) for row, name in zip(rows, found, strict=True)]
    asked_of = set(forms[: len(records)])  # names alone: who asks otherwise asks about other things
    names = _Names([name for name, form in zip(found, forms, strict=True) if name and form in asked_of], rows, rng)
    made, renamed = [], 0
    for fact, subject in zip(facts, found, strict=False):
        other = names.other(subject) if subject else None
        renamed += other is not None
        pairs = [] if other is None else names.exchanged(subject, other)
        made.append(_placebo(fact, pairs, rng))
    return Placebos(tuple(made), renamed)


def _placebo(fact: Fact, names: Sequence[tuple[str, str]], rng: random.Random) -> Fact:
    if not fact.asks:  # a plain text has none, and its place is empty
        return Fact(fact.record)
    made = Fact(fact.record, names=tuple(names))
    options = [fact.record.completion, *fact.wrong]
    changed = made.renamed(fact.record.completion) != fact.record.completion  # else its own answer would be the fact's
    at = rng.randrange(0 if changed or not fact.wrong else 1, len(options))
    answer = made.renamed(options[at])
    record = replace(made.put(fact.record, answer), meta={})
    wrong = tuple(made.renamed(option) for i, option in enumerate(options) if i != at)
    same = tuple(made.put(p, answer) for p in fact.paraphrases)
    return replace(made, record=record, wrong=wrong, paraphrases=same)


def _small(subject: str) -> set[str]:
    """Return the words without a capital of a name that has others with one: "of", "the"."""
    parts = subject.split()
    small = {part for part in parts if part[:1].islower()}
    return small if len(small) < len(set(parts)) else set()


class _Names:
    """Names of subjects that no row has."""

    def __init__(self, subjects: Sequence[str], records: Sequence[Record], rng: random.Random) -> None:
        self._taken = set(subjects)
        self._text = "\n".join(text for r in records for text in (*(text for _, text in r.turns), r.completion))
        self._spelled = set(WORD.findall(self._text))
        self._rng, self._made = rng, dict[str, str]()
        self._pools: dict[tuple[bool, str], list[str]] = {}
        for subject in sorted(self._taken):  # in scripts without spaces the words are characters
            first, *later = [word for word in pieces(subject) if word.strip()] or [subject]
            bare = is_unspaced(subject)
            self._pools.setdefault((bare, "first" if later else "single"), []).append(first)
            small = _small(subject)
            self._pools.setdefault((bare, "later"), []).extend(word for word in later if word not in small)

    def other(self, subject: str) -> str | None:
        """Return the name that stands for a subject, always the same one; None where none was found."""
        if subject not in self._made:
            found = next((name for name in self._drawn(subject) if name not in self._text), None)
            if found is None:
                return None
            self._made[subject] = found
            self._text += "\n" + found
        return self._made[subject]

    def exchanged(self, subject: str, other: str) -> list[tuple[str, str]]:
        """Return what is exchanged for what: the whole name, and those of its words that are names by themselves, for
        the answer may put them elsewhere. Single characters stand everywhere where no spaces are."""
        if is_unspaced(subject):
            return [(subject, other)]
        parts = zip(subject.split(), other.split(), strict=True)
        return [(subject, other), *((theirs, ours) for theirs, ours in parts if self._is_name(theirs))]

    def _is_name(self, word: str) -> bool:
        """Return whether a word has a capital, and stands nowhere without ("The", "the"); of a script that has none,
        whether it is made of letters."""
        if word.lower() == word.upper():
            return word.isalpha()
        return word[:1].isupper() and word.lower() not in self._spelled

    def _drawn(self, subject: str) -> list[str]:
        """Words of other subjects, or characters, where they stand first or later, but for the small words of a title;
        of a single word, halves of two."""
        parts, rng, bare = [word for word in pieces(subject) if word.strip()], self._rng, is_unspaced(subject)
        if len(parts) > 1:
            later, small = self._pools[bare, "later"], _small(subject)
            pools = [self._pools[bare, "first"], *([part] if part in small else later for part in parts[1:])]
            return [between(subject).join(map(rng.choice, pools)) for _ in range(_TRIES)]
        found = []
        for _ in range(_TRIES):
            a, b = rng.choice(self._pools[bare, "single"]), rng.choice(self._pools[bare, "single"])
            found.append(a[: (len(a) + 1) // 2] + b[len(b) // 2 :].lower())
        return found
