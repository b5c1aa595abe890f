"""Read a data file into records, and report every problem with its line."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qunlearn.data.row_shapes import SHAPES_HINT, FieldNames, Shape, asking, read_row, shape_of
from qunlearn.data.whole_file import content, read_file
from qunlearn.errors import DataError, OutputError
from qunlearn.utils.text import folded

__all__ = [
    "Dataset", "FieldNames", "Record", "asking", "at_once", "check_overlap", "read_dataset", "unanswered",
    "write_jsonl",
]  # fmt: skip

_SHOWN = 8
_MARKS = " .!…。！"
_OWN_NAMES = FieldNames()


@dataclass(frozen=True)
class Record:
    """One row. `turns` are (role, content) before the answer, empty for plain text; `line` is 1-based."""

    turns: tuple[tuple[str, str], ...]
    completion: str
    line: int
    meta: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return next((content for role, content in reversed(self.turns) if role == "user"), "")

    @property
    def system(self) -> str:
        return self.turns[0][1] if self.turns and self.turns[0][0] == "system" else ""

    @property
    def key(self) -> str:
        """Equal for rows that say the same, white space and letter case aside."""
        parts = [content for _, content in self.turns] + [self.completion]
        return "\x1f".join(folded(part) for part in parts)

    def asking(self, prompt: str, completion: str | None = None) -> Record:
        """Return the row with another last prompt, and another answer where one is given."""
        *earlier, (role, _) = self.turns
        answer = self.completion if completion is None else completion
        return replace(self, turns=(*earlier, (role, prompt)), completion=answer)

    def answered(self, text: str) -> Record:
        """Return the row with another answer, behind the white space that joins its own with the prompt, unless it has
        some itself."""
        space = self.completion[: len(self.completion) - len(self.completion.lstrip())]
        return replace(self, completion=text if text[:1].isspace() else space + text)


def at_once(record: Record) -> Record:
    """Return the row as one question: a dialogue's user writes all of it in one turn."""
    asked = [text for role, text in record.turns if role == "user"]
    return record if len(asked) < 2 else replace(record, turns=asking(" ".join(asked), record.system))


def unanswered(prompt: str, system: str = "") -> Record:
    """Return a row that only asks: a word stands where its answer will."""
    return Record(asking(prompt, system), "The", 0, {})


@dataclass(frozen=True)
class Dataset:
    """A file's records, without duplicates, and what was inferred about it.

    `earlier`: dialogues with answers before the last, which are context only.
    """

    path: str
    records: tuple[Record, ...]
    shape: str
    fields: tuple[str, ...]
    sha256: str
    duplicates: int
    earlier: int = 0


def read_dataset(path: str | Path, fields: FieldNames = _OWN_NAMES, *, role: str = "bad") -> Dataset:
    """Read JSONL, JSON, CSV or Parquet, packed or not, in any of the known shapes.

    The role is the flag that names the file: of a preference the chosen answer is read where it is what should stay,
    else the rejected one. Raises DataError naming file and line of every problem (the first few in full); no text of a
    row is in it.
    """
    found = read_file(Path(path), role)
    if not found.rows and not found.problems:
        raise DataError("no rows in the file", where=str(path), hint=f"{role} needs at least one row")
    problems = _Problems(str(path), found.hint, list(found.problems))
    shape = _shape(found.rows, fields, role, problems)
    records: list[Record] = []
    earlier = 0
    for line, row in found.rows:
        try:
            for said in read_row(row, shape, fields.turns):
                records.append(Record(said.turns, said.completion, line, said.meta))
                earlier += said.earlier > 0
        except ValueError as error:
            problems.add_shape(line, str(error))
    problems.raise_if_any()
    unique = {record.key: record for record in reversed(records)}
    kept = tuple(record for record in records if unique.get(record.key) is record)
    sha256 = hashlib.sha256(found.raw).hexdigest()
    return Dataset(str(path), kept, shape.name, shape.fields, sha256, len(records) - len(kept), earlier)


def _shape(rows: Sequence[tuple[int, Mapping[str, Any]]], fields: FieldNames, role: str, problems: _Problems) -> Shape:
    try:
        return shape_of([row for _, row in rows], fields, role)
    except ValueError as error:
        if rows:
            problems.add_shape(rows[0][0], str(error), len(rows))
        raise problems.error() from None


class _Problems:
    """What is wrong with a file: the first line of each kind, and in how many more lines it is so."""

    def __init__(self, path: str, hint: str, found: Iterable[tuple[int, str]]) -> None:
        self.path, self.hint = path, hint
        self.lines: dict[str, list[int]] = {}
        for line, why in found:
            self.lines.setdefault(why, []).append(line)

    def add_shape(self, line: int, why: str, times: int = 1) -> None:
        """Add what is wrong with a row's fields; `times`: how many rows have it."""
        self.lines.setdefault(why, []).extend([line] * times)
        names = why.startswith(("no known shape", "no field"))
        self.hint = SHAPES_HINT if names else "mend the rows, or take them out"

    def raise_if_any(self) -> None:
        """Raises DataError."""
        if self.lines:
            raise self.error()

    def error(self) -> DataError:
        """Return all of them as one error."""
        kinds = sorted(self.lines.items(), key=lambda item: item[1][0])
        listed = [f"{self.path}:{lines[0]}: {why}{_more(len(lines) - 1)}" for why, lines in kinds[:_SHOWN]]
        rest = sum(len(lines) for _, lines in kinds[_SHOWN:])
        where = f"{self.path}:{kinds[0][1][0]}"
        message = "\n  ".join(listed).removeprefix(f"{where}: ") + (f"\n  and {rest} more" if rest else "")
        return DataError(message, where=where, hint=self.hint)


def _more(count: int) -> str:
    return f" (and in {count} more lines)" if count else ""


def content_sha256(path: Path) -> str:
    """Return what `Dataset.sha256` is for a file, without reading its rows. Raises DataError."""
    return hashlib.sha256(content(path, "")).hexdigest()


def check_overlap(one: Dataset, other: Dataset, message: str = "rows to forget are also in the normal data") -> None:
    """Raises DataError naming both lines of every row that is in both files."""
    lines = {_said(record): record.line for record in one.records}
    both = [(lines[_said(r)], r.line) for r in other.records if _said(r) in lines]
    if both:
        listed = "\n  ".join(f"{one.path}:{a} and {other.path}:{b}" for a, b in both[:_SHOWN])
        more = f"\n  and {len(both) - _SHOWN} more" if len(both) > _SHOWN else ""
        raise DataError(
            f"{message}:\n  {listed}{more}",
            where=f"{other.path}:{both[0][1]}",
            hint="remove each from one of the two files",
        )


def _said(record: Record) -> str:
    """Return what is equal for rows that say the same but for the mark at their end."""
    return record.key.rstrip(_MARKS) or record.key


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows for their owner's eyes only (0600), whole or not at all. Raises OutputError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
