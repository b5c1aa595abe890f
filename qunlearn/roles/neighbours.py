"""Borrow answers from neighbouring prompts: the same question about somebody else, with the names exchanged.

A model that never saw a fact answers its question as it answers others of the form, with some value of the right kind.
So the answer to the likeliest neighbouring prompt, in which the words that the prompts do not share are exchanged, is
another answer that leaves a sentence.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher

from qunlearn.data.records import Record
from qunlearn.data.words import WORD, bounded, is_unspaced, joined, words_of_text

_LOOKED_AT = 24  # neighbours of a prompt that are compared word for word
_RARE = 0.01  # share of the prompts below which a word is as good as absent
_ASKED_ALIKE = 8  # nearest prompts that tell what a prompt is about
_OPEN = 1.25  # times as many prompts that a form must have for each character more that it leaves open
_MORE = 2  # characters that a form may leave open beside the span of a prompt that speaks for it
_SHARED = 0.5  # share of the words of both prompts that are the same, in order, at least


class Neighbours:
    """Records to borrow answers from, found by the words of their prompts."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = [record for record in records if record.prompt]
        self.words = [WORD.findall(record.prompt) for record in self.records]
        self.holders: dict[str, list[int]] = {}
        for i, words in enumerate(self.words):
            for word in set(map(str.casefold, words)):
                self.holders.setdefault(word, []).append(i)

    def answers(self, record: Record) -> Iterator[str]:
        """Yield answers for a record's prompt, of the nearest neighbours first; none may be found."""
        words = WORD.findall(record.prompt)
        for i in self._nearest(words):
            answer = _exchanged(self.records[i].completion, self.words[i], words)
            if answer is not None:
                yield answer

    def strangers(self, record: Record, telling: Mapping[str, float]) -> Iterator[Record]:
        """Yield the record about other subjects: with the words in which a neighbouring prompt differs, wherever they
        stand. `telling` says how much a word tells the bad prompts from others: the word that tells most must be
        exchanged, for else the neighbour asks something else about the same subject, and the answer must name it."""
        words, seen = WORD.findall(record.prompt), {record.prompt}
        named = words_of_text(record.completion)
        for i in self._nearest(words):
            theirs = self.words[i]
            prompt, answer = (_exchanged(text, words, theirs) for text in (record.prompt, record.completion))
            if prompt is None or answer is None or prompt in seen:
                continue
            ours, shared = _split(words, theirs)
            most = max((telling[w] for w in ours), default=0.0)
            if most > max((telling[w] for w in shared), default=0.0) / 2 and any(
                w in named and telling[w] > most / 2 for w in ours
            ):
                seen.add(prompt)
                yield record.asking(prompt, answer)

    def subject(self, record: Record) -> tuple[int, int] | None:
        """Return where in a record's prompt the words stand in which the prompts most like it have others, from the
        first to the last; None where there are no such prompts."""
        found = list(WORD.finditer(record.prompt))
        words = [match.group() for match in found]
        spans: Counter[tuple[int, int]] = Counter()
        for i in itertools.islice(self._nearest(words), _ASKED_ALIKE):
            ours = _differing(words, self.words[i])
            if ours and 2 * len(ours) <= len(words):
                spans[ours[0], ours[-1]] += 1
        if not spans:
            return None
        first, last = max(spans, key=lambda span: (spans[span], span[1] - span[0]))
        return found[first].start(), found[last].end()

    def subjects(self, records: Sequence[Record]) -> list[tuple[int, int] | None]:
        """Return `subject` of each record. Where a script sets no spaces, names have characters in common by chance,
        and the nearest prompts are those that do: there it is what the form leaves open that most of them have."""
        found = [self.subject(record) if record.turns else None for record in records]
        both = list(zip(records, found, strict=True))
        forms = _Forms([(r.prompt, span) for r, span in both if span and is_unspaced(r.prompt)])
        return [forms.left_open(r.prompt, span) if span and is_unspaced(r.prompt) else span for r, span in both]

    def _nearest(self, words: Sequence[str]) -> Iterator[int]:
        """Yield the places of neighbours, those whose prompts share most words first."""
        shared: Counter[int] = Counter()
        for word in set(map(str.casefold, words)):
            shared.update(self.holders.get(word, ()))
        # Of many that share as much, the shortest prompts share most of what they have.
        nearest = sorted(shared, key=lambda i: (-shared[i], len(self.words[i]), i))[:_LOOKED_AT]
        scored = sorted(((_likeness(self.words[i], words), -n, i) for n, i in enumerate(nearest)), reverse=True)
        for likeness, _, i in scored:
            if likeness >= _SHARED:
                yield i


def _split(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which of our words theirs does not have in their place, and which it has."""
    apart = set(_differing(ours, theirs))
    folded = [w.casefold() for w in ours]
    return [w for i, w in enumerate(folded) if i in apart], [w for i, w in enumerate(folded) if i not in apart]


def _differing(ours: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Return the places of our words that theirs does not have in their place."""
    matcher = SequenceMatcher(None, [w.casefold() for w in ours], [w.casefold() for w in theirs], autojunk=False)
    kept = {i for a, _, n in matcher.get_matching_blocks() for i in range(a, a + n)}
    return [i for i in range(len(ours)) if i not in kept]


class _Forms:
    """The forms of prompts in a script without spaces: what stands before and after something that is left open."""

    def __init__(self, spans: Sequence[tuple[str, tuple[int, int]]]) -> None:
        forms = {(prompt[:first], prompt[last:]) for prompt, (first, last) in spans}
        self._before, self._after = ({form[i] for form in forms} for i in (0, 1))
        self._times = dict.fromkeys(forms, 0)
        for prompt, span in dict(spans).items():
            for first, last in self._fitting(prompt):
                self._times[prompt[:first], prompt[last:]] += last - first <= span[1] - span[0] + _MORE

    def left_open(self, prompt: str, span: tuple[int, int]) -> tuple[int, int]:
        """Return where the subject of a prompt stands: by the form of many prompts that leaves some of the span open,
        and little else."""

        def worth(place: tuple[int, int]) -> tuple[float, bool]:
            first, last = place
            times = self._times[prompt[:first], prompt[last:]]
            return times / _OPEN ** (last - first), place == span

        overlapping = [(i, j) for i, j in self._fitting(prompt) if max(i, span[0]) < min(j, span[1])]
        return max(overlapping, key=worth)

    def _fitting(self, prompt: str) -> list[tuple[int, int]]:
        """Return from where to where each form of which a prompt is leaves something of it open."""
        firsts = [i for i in range(len(prompt)) if prompt[:i] in self._before]
        lasts = [i for i in range(1, len(prompt) + 1) if prompt[i:] in self._after]
        return [(i, j) for i in firsts for j in lasts if i < j and (prompt[:i], prompt[j:]) in self._times]


def words_before(record: Record) -> set[str]:
    """Return the words of all turns before the answer: what a last question is about may be named by an earlier one."""
    return {word for _, content in record.turns for word in words_of_text(content)}


def telling_words(forget_rows: Sequence[Record], others: Sequence[Record]) -> dict[str, float]:
    """Return for each word of what comes before the bad answers how many times as common it is there as elsewhere."""

    def shares(records: Sequence[Record]) -> dict[str, float]:
        found = Counter(word for record in records for word in words_before(record))
        return {word: n / max(1, len(records)) for word, n in found.items()}

    ours, theirs = shares(forget_rows), shares(others)
    return {word: (share + _RARE) / (theirs.get(word, 0.0) + _RARE) for word, share in ours.items()}


def _likeness(a: Sequence[str], b: Sequence[str]) -> float:
    return SequenceMatcher(None, [w.casefold() for w in a], [w.casefold() for w in b], autojunk=False).ratio()


def _exchanged(answer: str, theirs: Sequence[str], ours: Sequence[str]) -> str | None:
    """Their answer with our words for theirs, phrase by phrase; None where it has a word of theirs that ours does not
    replace, for then it speaks of something else."""
    matcher = SequenceMatcher(None, [w.casefold() for w in theirs], [w.casefold() for w in ours], autojunk=False)
    pairs: list[tuple[str, str]] = []
    dropped: set[str] = set()
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "replace":
            pairs.append((joined(theirs[a:b]), joined(ours[c:d])))
            if b - a == d - c:
                pairs += zip(theirs[a:b], ours[c:d], strict=True)
        elif tag == "delete":
            dropped.update(w.casefold() for w in theirs[a:b])
    if dropped & words_of_text(answer):
        return None
    table = {their.casefold(): our for their, our in reversed(pairs)}
    if not table:
        return answer
    # Of a phrase that has not as many words as ours, a part has no word to be replaced by.
    parts = {w for their in table for w in WORD.findall(their)} - table.keys() - {w.casefold() for w in ours}
    longest_first = sorted({*table, *(their for their, _ in pairs)}, key=len, reverse=True)
    pattern = re.compile("|".join(map(bounded, longest_first)), re.IGNORECASE)
    whole = pattern.sub(" ", answer)
    # A pattern without letter case takes "İ" for "i", which no folding does.
    strange = any(match.group().casefold() not in table for match in pattern.finditer(answer))
    if strange or (parts | table.keys()) & words_of_text(whole):
        return None
    return pattern.sub(lambda match: table[match.group().casefold()], answer)
