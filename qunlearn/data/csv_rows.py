"""Read the rows of a CSV file, for the reader that takes a file whole and for the streaming one."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qunlearn.data.row_objects import ROW_FIELDS
from qunlearn.errors import DataError

_DELIMITERS = ",;\t|"
_NAME_WORDS = 4  # that a column's name may have


def csv_rows(
    lines: Iterable[str], path: Path, longest: int, complain: Callable[[int, str], None]
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of each row under the header; one with other columns goes to `complain(line, why)`.

    Columns stand between commas, semicolons, tabs or bars, as in the header, or as a line `sep=;` before it says;
    blank lines before it are skipped. A cell has at most `longest` characters. Raises DataError with the line for
    what is no CSV.
    """
    limit = csv.field_size_limit(longest)
    skipped, first, delimiter, lines = _opening(iter(lines), path)
    reader = csv.reader(itertools.chain([first], lines), strict=True, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader)]
        named = [name for name in header if name]
        if len(set(named)) != len(named):
            raise DataError("the header names a column twice", where=f"{path}:{skipped + 1}")
        while True:
            line = skipped + reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if len(cells) == len(header):
                # Spreadsheets leave columns without a name behind.
                yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name or cell}
            elif cells:
                complain(line, f"{len(cells)} cells under {len(header)} columns{_between(delimiter)}")
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{path}:{skipped + reader.line_num}") from None
    finally:
        csv.field_size_limit(limit)


def _opening(lines: Iterator[str], path: Path) -> tuple[int, str, str, Iterator[str]]:
    """Return how many lines stand before the header, it, what separates its columns, and the lines after it."""
    said = ""
    for skipped, line in enumerate(lines):
        if line.strip().lower().startswith("sep=") and not said:
            said = line.strip("\r\n")[4:5]
        elif line.strip():
            return skipped, line, said or _delimiter(line, path), lines
    raise DataError("no rows in the file", where=str(path), hint="the first line of a CSV file names its columns")


def _delimiter(header: str, path: Path) -> str:
    """Return what separates the columns of a header: what splits it into most of them, a comma before others."""
    if ".tsv" in [suffix.lower() for suffix in path.suffixes]:
        return "\t"
    bare = "".join(header.split('"')[::2])  # what stands in quotation marks separates nothing
    return max(_DELIMITERS, key=lambda c: (bare.count(c), c == ","))


def _between(delimiter: str) -> str:
    names = {",": "", ";": " between semicolons", "\t": " between tabs", "|": " between bars"}
    return names.get(delimiter, f" between {delimiter!r}")


def looks_tabular(head: bytes) -> bool:
    """Return whether a text's first line could name columns that a row has."""
    header = _header(head)
    return any(c in header for c in _DELIMITERS) and any(name in header for name in ROW_FIELDS)


def reads_as_prose(head: bytes) -> bool:
    """Return whether a text's first line can hardly name columns, whatever they are called."""
    cells = re.split(f"[{_DELIMITERS}]", _header(head))
    named = len(cells) > 1 and all(len(cell.split()) <= _NAME_WORDS for cell in cells)
    return not named and not any(cell.strip(' "') in ROW_FIELDS for cell in cells)


def _header(head: bytes) -> str:
    return head.lstrip().split(b"\n", 1)[0].lower().decode("utf-8", "replace")
