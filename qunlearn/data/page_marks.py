"""Leave out what printed pages add to a text: their numbers, running heads, and the gap that a page's end leaves.

A number alone on a line may be a chapter's, a stanza's or an item's. A page's is in sequence with others, and they cut
sentences in two, as nothing else does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qunlearn.data.words import SENTENCE_END
from qunlearn.utils.text import folded

_FEED = "\f"
_AROUND = r"[\s\-–—|\[\](){}•·*~_]*"
_NUMBER = re.compile(rf"{_AROUND}(?:page )?(\d{{1,4}})(?: of \d{{1,4}}|/\d{{1,4}})?{_AROUND}", re.I)
_BESIDE = re.compile(r"(\d{1,4})\s+(\D*)|(\D*?)\s+(\d{1,4})")  # a head and its number on one line
_HEAD_CHARS, _BESIDES = 80, 2  # of a head, and lines between it and the text's end, or before it
_PAGE_CHARS = 300  # at least, between two numbers
_SKIPPED = 3  # pages at most from one number to the next
_TIMES, _WITHIN = 3, 6  # a head, or a number in sequence, is there so often; a head in so many places one after another
_OPEN = 64  # sequences that may go on: other numbers stand between those of pages
_HEADED = 0.8  # share of page numbers that have a head on one side, where they cut no sentences: verse
_CUT = 3  # one in so many page numbers, or more, cuts a sentence
_MOST_LINES = 500_000  # beside numbers and form feeds: in more of them no pages are looked for


@dataclass(frozen=True)
class _Line:
    at: int
    text: str
    chars: int  # of the text before it
    is_whole: bool

    @property
    def number(self) -> int | None:
        found = _NUMBER.fullmatch(self.text) if self.is_whole else None
        return int(found[1]) if found else None


@dataclass
class _Place:
    """Where a page may end: numbers and form feeds, with two lines before and after them.

    `heads` are the places among `lines` of running heads, `numbers` of page numbers, alone or beside a head, `is_prose`
    where pages cut sentences.
    """

    lines: list[_Line]
    heads: set[int] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)
    is_prose: bool = False

    @property
    def has_feed(self) -> bool:
        return any(line.text == _FEED for line in self.lines)

    def head(self, i: int) -> tuple[str, int | None]:
        """Return a line as a head without the number beside it, and that number; at a form feed alone there is one."""
        line = self.lines[i]
        if not line.is_whole or line.number is not None or line.text == _FEED or len(line.text) > _HEAD_CHARS:
            return "", None
        beside = _BESIDE.fullmatch(line.text) if self.has_feed else None
        if beside is None:
            return folded(line.text), None
        return folded(beside[2] or beside[3] or ""), int(beside[1] or beside[4])

    @property
    def headed(self) -> tuple[bool, bool]:
        """Return whether at a form feed a head without a number stands below, and above a page."""
        first = next(i for i, line in enumerate(self.lines) if line.text == _FEED or line.number is not None)
        bare = [i for i in self.heads if self.has_feed and self.head(i)[1] is None]
        return any(i < first for i in bare), any(i > first for i in bare)

    def around(self) -> tuple[_Line, _Line] | None:
        """Return the text's lines before and after all that may be the page's; None where text is between, or none."""
        marks = [i for i, x in enumerate(self.lines) if x.text == _FEED or i in self.heads or x.number is not None]
        first, last = marks[0], marks[-1]
        if len(marks) != last - first + 1 or first == 0 or last + 1 == len(self.lines):
            return None
        return self.lines[first - 1], self.lines[last + 1]

    @property
    def is_cut(self) -> bool:
        """Return whether a sentence goes on behind the page's end: in small letters, or those of a script without, or
        where others do in a line that is no heading."""
        if (found := self.around()) is None or SENTENCE_END.search(found[0].text):
            return False
        begun = next(filter(str.isalnum, found[1].text), "")
        goes_on = begun.isalpha() and not begun.isupper()
        return goes_on or (self.is_prose and len(found[1].text) > _HEAD_CHARS // 2)


def without_page_marks(read: Callable[[], Iterable[str]], dropped: Counter[str]) -> Iterator[str]:
    """Yield the lines of a text, which is read twice, without its pages' numbers and heads, and without the blank lines
    there where a sentence goes on. `dropped` counts the lines that were no blank ones."""
    places = _places(_parts(read()))
    marks, blank = _marks(places)
    for at, part in enumerate(_parts(read())):
        if at in marks:
            dropped["page numbers and running heads"] += 1
        elif at not in blank:
            yield part


def _parts(lines: Iterable[str]) -> Iterator[str]:
    """Lines, or parts of long ones, with form feeds for themselves."""
    for line in lines:
        yield from filter(None, re.split(f"({_FEED})", line) if _FEED in line else (line,))


def _places(parts: Iterable[str]) -> list[_Place]:
    """Return where numbers stand alone, and form feeds; none of a text of columns of numbers."""
    places: list[_Place] = []
    last: list[_Line] = []
    after, chars, count, begins = 3, 0, 0, True
    for at, part in enumerate(parts):
        ends = part[-1] in "\n\r\f"
        text = _FEED if part == _FEED else part.strip()
        shown = text if len(text) <= 2 * _HEAD_CHARS else text[:_HEAD_CHARS] + text[-_HEAD_CHARS:]
        line = _Line(at, shown, chars, begins and ends)
        begins, chars = ends, chars + len(text)
        if not text:
            continue
        if text == _FEED or line.number is not None:
            if after > _BESIDES:
                places.append(_Place([*last]))
            after = 0
        else:
            after += 1
        if after <= _BESIDES and places:
            places[-1].lines.append(line)
            count += 1
        if text != _FEED:
            last = [*last, line][-_BESIDES:]
        if count > _MOST_LINES:
            return []
    return places


def _marks(places: Sequence[_Place]) -> tuple[set[int], set[int]]:
    """Return the lines that are a page's, and the blank ones and form feeds around them where a sentence goes on."""
    _find_heads(places)
    headed = [place for place in places if any(place.headed)]
    is_cut = _CUT * sum(place.is_cut for place in headed) >= len(headed)
    for chain in _chains(places):
        is_prose = _CUT * sum(place.is_cut for place, _ in chain) >= len(chain)
        sides = zip(*(place.headed for place, _ in chain), strict=True)
        if len(chain) >= _TIMES and (is_prose or max(map(sum, sides)) >= _HEADED * len(chain)):
            for place, i in chain:
                place.numbers.add(i)
                place.is_prose = is_prose
    marks, blank = set[int](), set[int]()
    for place in places:
        heads = {i for i in place.heads if place.numbers or (is_cut and place.has_feed and place.head(i)[1] is None)}
        gone = {place.lines[i].at for i in heads | place.numbers}
        marks |= gone
        if (place.numbers or place.has_feed) and place.is_cut and (found := place.around()):
            between = range(found[0].at + 1, found[1].at)
            if all(line.at in gone or line.text == _FEED for line in place.lines if line.at in between):
                blank.update(between)
    return marks, blank


def _find_heads(places: Sequence[_Place]) -> None:
    """Mark the lines beside form feeds and numbers that are there again and again."""
    there: dict[str, list[tuple[int, int]]] = {}
    for n, place in enumerate(places):
        for i in range(len(place.lines)):
            if (head := place.head(i)[0]) and there.setdefault(head, [(-1, 0)])[-1][0] != n:
                there[head].append((n, i))
    for _, *found in there.values():
        for k in range(len(found) - _TIMES + 1):
            if found[k + _TIMES - 1][0] - found[k][0] <= _WITHIN:
                for n, i in found[k : k + _TIMES]:
                    places[n].heads.add(i)
    for place in places:  # but none behind a line of the text
        marks = {i for i, x in enumerate(place.lines) if x.text == _FEED or x.number is not None}
        first, last = min(marks), max(marks)
        while first - 1 in place.heads:
            first -= 1
        while last + 1 in place.heads:
            last += 1
        place.heads &= {*range(first, last + 1)}


def _chains(places: Sequence[_Place]) -> list[list[tuple[_Place, int]]]:
    """Return numbers in sequence, a page or more apart, as places and lines there."""
    done: list[list[tuple[_Place, int]]] = []
    # The one that was added to last is at the end; with its last number, and where that stands.
    going: list[tuple[int, int, list[tuple[_Place, int]]]] = []
    for place in places:
        for i, line in enumerate(place.lines):
            number = place.head(i)[1] if i in place.heads else line.number
            if number is None:
                continue
            fitting = [
                k
                for k, (before, chars, _) in enumerate(going)
                if before < number <= before + _SKIPPED and line.chars - chars >= _PAGE_CHARS * (number - before)
            ]
            k = max(fitting, key=lambda k: going[k][:2], default=None)
            chain = going.pop(k)[2] if k is not None else []
            chain.append((place, i))
            going.append((number, line.chars, chain))
            done += [chain for *_, chain in going[:-_OPEN]]
            del going[:-_OPEN]
    return [*done, *(chain for *_, chain in going)]
