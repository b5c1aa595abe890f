"""Find passages that two files share, in whatever rows each of them has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from qunlearn.data.records import Dataset, Record
from qunlearn.data.statistics import prompt_key
from qunlearn.data.words import is_unspaced, words
from qunlearn.utils.text import folded

_WORDS, _CHARS = 12, 24  # in a row that are looked for, in a script without spaces characters
_MORE = 8  # words in a row beyond these that are a passage, where a text has so many: moulds share some
_FORM = 4  # different texts of a file: what more of them have is form, such as a licence
_SHOWN = 4


@dataclass(frozen=True)
class SharedText:
    """Rows of the file `there` that hold passages of the file `here`, as pairs of lines."""

    here: str
    there: str
    pairs: tuple[tuple[int, int], ...]

    @property
    def line(self) -> str:
        listed = ", ".join(f"{self.here}:{a} and {self.there}:{b}" for a, b in self.pairs[:_SHOWN])
        more = f", and {len(self.pairs) - _SHOWN} more" if len(self.pairs) > _SHOWN else ""
        return f"{len(self.pairs)} rows of {self.there} hold passages of {self.here}, cut otherwise ({listed}{more})"

    @property
    def record(self) -> dict[str, object]:
        """Return what record.json says: both files, how many rows, the first pairs of lines."""
        return {"here": self.here, "there": self.there, "rows": len(self.pairs), "first": self.pairs[:_SHOWN]}


def shared_text(here: Dataset, *others: Dataset | None) -> tuple[SharedText, ...]:
    """Return which of the other files, where they are given, hold passages of this one."""
    found = [SharedText(here.path, there.path, shared_passages(here, there)) for there in others if there]
    return tuple(shared for shared in found if shared.pairs)


def shared_passages(here: Dataset, there: Dataset) -> tuple[tuple[int, int], ...]:
    """Return (line here, line there) for each row there whose answer, or text, has 20 words in a row of one here, or is
    shorter and stands there whole.

    What many texts of a file have is form. Another answer to a prompt here corrects that one, whatever they share.
    """
    first: dict[int, int] = {}
    ours, theirs = Counter[int](), Counter[int]()
    for text, lines in _texts(here, frozenset()):
        runs = _runs(text)
        ours.update(set(runs))
        for run in runs:
            first.setdefault(run, lines[0])
    asked = frozenset(prompt_key(record) for record in here.records if record.turns)
    found = []
    for text, lines in _texts(there, asked):
        if first.keys() & _runs(text, step=1 + _MORE):  # one of these is in any passage
            runs = _runs(text)
            theirs.update(first.keys() & runs)
            found.append((runs, lines))
    pairs = []
    for runs, lines in found:
        own = [0 if ours[run] > _FORM or theirs[run] > _FORM else first.get(run, 0) for run in runs]
        most = max(((len([*some]), line) for line, some in groupby(own) if line), default=(0, 0))
        if most[0] >= min(len(runs), 1 + _MORE):
            pairs += [(most[1], line) for line in lines]
    return tuple(sorted(pairs, key=lambda pair: pair[1]))


def _texts(dataset: Dataset, asked: frozenset[str]) -> Iterable[tuple[str, list[int]]]:
    """Return each text that is an answer, or a plain text, with its lines, but for answers to these prompts."""
    out: dict[int, tuple[str, list[int]]] = {}
    for record in dataset.records:
        if not record.turns or prompt_key(record) not in asked:
            out.setdefault(hash(folded(record.completion)), (record.completion, []))[1].append(record.line)
    return out.values()


def _runs(text: str, more: int = 0, step: int = 1) -> list[int]:
    """Return a number for each run of so many words, in order, or for some of them."""
    every, size = words(text), _size(text) + more
    return [hash(tuple(every[i : i + size])) for i in range(0, len(every) - size + 1, step)]


def _size(text: str) -> int:
    return _CHARS if is_unspaced(text) else _WORDS


class Recited:
    """How much of a row stands in others, 20 words in a row or more, in whatever pieces those have it."""

    def __init__(self, rows: Sequence[Record]) -> None:
        by_line: dict[int, set[int]] = {}  # rows of one text, and those begun further on, are of one line
        for row in rows:
            by_line.setdefault(row.line, set()).update(_runs(_whole(row), _MORE))
        found = Counter(run for runs in by_line.values() for run in runs)
        self._runs = {run for run, lines in found.items() if lines <= _FORM}

    def share(self, row: Record) -> float:
        """Return the share of a row's words that are in such runs."""
        text = _whole(row)
        runs, size = _runs(text, _MORE), _size(text) + _MORE
        theirs = {i + n for i, run in enumerate(runs) if run in self._runs for n in range(size)}
        return len(theirs) / (len(runs) + size - 1) if theirs else 0.0


def _whole(row: Record) -> str:
    return f"{row.prompt} {row.completion}"
