"""The rows of a CSV file, for both readers: the one that takes a file whole and the one that goes through it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qunlearn.errors import DataError


def csv_rows(
    lines: Iterable[str], path: Path, longest: int, complain: Callable[[int, str], None]
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of each row under the header; one with other columns goes to `complain(line, why)`.

    A cell has at most `longest` characters. Raises DataError with the line for what is no CSV.
    """
    limit = csv.field_size_limit(longest)
    reader = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) != len(header):
            raise DataError("the header names a column twice", where=f"{path}:1")
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True))
            elif cells:
                complain(line, f"{len(cells)} cells under {len(header)} columns")
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{path}:{reader.line_num}") from None
    finally:
        csv.field_size_limit(limit)
