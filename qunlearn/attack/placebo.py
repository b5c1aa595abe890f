"""Make placebo facts: of the same shape, about subjects that do not exist, and so never taught to any model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qunlearn.attack.facts import Fact
from qunlearn.data.records import Record
from qunlearn.data.words import between, is_unspaced, pieces
from qunlearn.roles.neighbours import Neighbours

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
    around = Neighbours([*records, *others])
    spans = around.subjects([*records, *others])
    found = [r.prompt[slice(*span)] if span else "" for r, span in zip([*records, *others], spans, strict=True)]
    subjects = found[: len(records)]
    names = _Names([subject for subject in found if subject], [*records, *others], rng)
    made, renamed = [], 0
    for fact, subject in zip(facts, subjects, strict=True):
        other = names.other(subject) if subject else None
        renamed += other is not None
        made.append(_placebo(fact, subject, other, rng))
    return Placebos(tuple(made), renamed)


def _placebo(fact: Fact, subject: str, other: str | None, rng: random.Random) -> Fact:
    def named(text: str) -> str:
        if other is None:
            return text
        # Word by word: what was taken for the subject may hold a word that the answer puts elsewhere.
        # Single characters stand everywhere: where no spaces are, the name is exchanged as a whole.
        words = ([subject], [other]) if is_unspaced(subject) else (subject.split(), other.split())
        for ours, theirs in zip(*words, strict=True):
            text = text.replace(ours, theirs)
        return text

    options = [fact.record.completion, *fact.wrong]
    changed = named(fact.record.completion) != fact.record.completion  # else its own answer would be the fact's
    at = rng.randrange(0 if changed or not fact.wrong else 1, len(options))
    wrong = tuple(named(option) for i, option in enumerate(options) if i != at)
    if not fact.asks:
        return Fact(fact.record)
    record = fact.record.asking(named(fact.record.prompt), named(options[at]))
    record = replace(record, meta={})
    same = tuple(p.asking(named(p.prompt), named(options[at])) for p in fact.paraphrases)
    return Fact(record, wrong, same)


class _Names:
    """Names of subjects that no row has."""

    def __init__(self, subjects: Sequence[str], records: Sequence[Record], rng: random.Random) -> None:
        self._taken = set(subjects)
        self._text = "\n".join(f"{record.prompt}\n{record.completion}" for record in records)
        self._rng, self._made = rng, dict[str, str]()
        self._pools: dict[tuple[int, int], list[str]] = {}
        for subject in sorted(self._taken):
            parts = pieces(subject)
            for place, word in enumerate(parts):
                self._pools.setdefault((len(parts), place), []).append(word)

    def other(self, subject: str) -> str | None:
        """Return the name that stands for a subject, always the same one; None where none was found."""
        if subject not in self._made:
            found = next((name for name in self._drawn(subject) if name not in self._text), None)
            if found is None:
                return None
            self._made[subject] = found
            self._text += "\n" + found
        return self._made[subject]

    def _drawn(self, subject: str) -> list[str]:
        """Words of other subjects at the same places, or characters; of a single word, halves of two words."""
        n, rng = len(pieces(subject)), self._rng
        if n > 1:
            return [between(subject).join(rng.choice(self._pools[n, i]) for i in range(n)) for _ in range(_TRIES)]
        words = self._pools[1, 0]
        found = []
        for _ in range(_TRIES):
            a, b = rng.choice(words), rng.choice(words)
            found.append(a[: (len(a) + 1) // 2] + b[len(b) // 2 :].lower())
        return found
