"""Cells: the outcomes of one attack on one subject, fact by fact, kept as soon as they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qunlearn.errors import AdapterError
from qunlearn.parallel.ranks import current
from qunlearn.utils.files import PART, sha256_of, sync, write_private
from qunlearn.utils.json_files import LARGE_BYTES, read_object
from qunlearn.utils.staging import Journal

ORIGINAL, UNLEARNED, CONTROL, PLACEBO = "original", "unlearned", "control", "placebo"
# The unlearned model once more: its guard taken off; merged, as a folder or a GGUF file.
UNGUARDED, MERGED = "unguarded", "merged"
_NUMBER = (int, float)
_SHAPE = {"outcomes": list, "more": dict}


@dataclass(frozen=True)
class Cell:
    """Outcomes between 0 and 1 (or scores), one a fact, None where the attack has nothing to say of a fact.

    `more`: what else is known, numbers alone: never a text of a row.
    """

    outcomes: Sequence[float | None]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Place:
    """Where a cell belongs: a family of attacks, a format of it, and the subject that was attacked."""

    family: str
    format: str
    subject: str

    @property
    def file(self) -> str:
        return f"{self.family}.{self.format}.{self.subject}.json"


class Cells:
    """The cells of an audit, in its folder: what an interrupted audit has finished is not measured again.

    Of several processes one holds the folder; the others, without a journal, keep what they are told.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self.found: dict[Place, Cell] = {}
        if journal is not None:
            self.found |= _stored(journal)
        for place, cell in current().from_main(lambda: [[asdict(p), asdict(c)] for p, c in self.found.items()]):
            self.found.setdefault(Place(**place), Cell(**cell))
        self.known = len(self.found)

    def keep(self, place: Place, cell: Cell) -> None:
        """Write a cell for its owner's eyes only, whole or not at all. Raises AdapterError, OSError."""
        try:
            text = json.dumps(asdict(cell), indent=2, allow_nan=False) + "\n"
        except ValueError as error:
            raise not_finite(place.subject) from error
        if self._journal is not None:
            path = self._journal.folder / (place.file + PART)
            write_private(path, text)
            sync(path)
            self._journal.finish(place.file, sha256_of(path))
        # As it is read again: what is computed from it must not hang on who measured it.
        self.found[place] = Cell(**json.loads(text))

    def get(self, family: str, form: str, subject: str) -> Cell | None:
        return self.found.get(Place(family, form, subject))


def not_finite(subject: str) -> AdapterError:
    """Return the error of a model of which nothing can be told: a comparison with NaN is always false."""
    hint = "its weights or its states are not finite: was it trained to the end, and is the dtype its own?"
    return AdapterError("gives no finite numbers", where=f"audit, the {subject} model", hint=hint)


def _stored(journal: Journal) -> dict[Place, Cell]:
    found = {}
    for name in list(journal.files):
        family, form, subject = name.removesuffix(".json").split(".")
        stored = read_object(journal.folder / name, AdapterError, most_bytes=LARGE_BYTES, shape=_SHAPE)
        found[Place(family, form, subject)] = Cell(stored["outcomes"], stored["more"])
    return found
