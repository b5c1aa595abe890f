"""Read a data file whole, within bounds: its bytes, its rows, and what is no row."""

from __future__ import annotations

import io
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qunlearn.data.file_types import HEAD_BYTES, check_holds_rows, unpacked
from qunlearn.data.local_path import local_path
from qunlearn.data.row_reader import is_table, rows_in
from qunlearn.errors import DataError

_MOST_BYTES, _LARGE_BYTES = 1 << 30, 64 << 20
_JSON_HINT = "one JSON object a line, or one list of objects"
_CSV_HINT = "the first line of a CSV file names its columns, such as prompt,completion; a cell with line breaks or "
_CSV_HINT += "separators in it stands in quotation marks"


@dataclass
class Found:
    """The rows of a file with their lines, and what is no row; `hint`: what such a file looks like."""

    raw: bytes
    hint: str = _JSON_HINT
    rows: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)


def read_file(path: Path, role: str) -> Found:
    """Read a file whole. Raises DataError where it holds no text."""
    where, raw = str(path), content(path, role)
    check_holds_rows(raw[:HEAD_BYTES], where)
    if len(raw) > _LARGE_BYTES and b"\0" in raw:  # the hole of a sparse file: no text, and a lot of it
        raise DataError("holds NUL characters: it is no text", where=where, hint="give JSONL, JSON or CSV")
    found = Found(raw, _CSV_HINT if is_table(raw, path) else _JSON_HINT)
    try:
        for line, row in rows_in(io.BytesIO(raw), raw, path, lambda *p: found.problems.append(p), len(raw)):
            if isinstance(row, str):
                found.problems.append((line, "not an object but a text"))
            else:
                found.rows.append((line, row))
    except DataError as error:
        at = (error.where or "").rpartition(":")[2]
        if error.hint or not at.isdecimal():  # no fault of a row, or one that says itself what to do
            raise
        found.problems.append((int(at), error.message))
    return found


def content(path: Path, role: str) -> bytes:
    """Return what a file holds, unpacked. Raises DataError where that is nothing."""
    where = str(path)
    raw = unpacked(_bytes(path, role), where)
    if not raw.strip():
        raise DataError("the file is empty", where=where, hint=f"{role} needs at least one row")
    return raw


def _bytes(path: Path, role: str) -> bytes:
    where = str(path)
    try:
        status = path.stat()
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            raise DataError("is a device, not a file", where=where, hint="give a file")
        raw = path.read_bytes() if status.st_size <= _MOST_BYTES else b""
        if max(status.st_size, len(raw)) > _MOST_BYTES:
            hint = "give a part of it: `qunlearn data import` takes --limit"
            raise DataError(f"is larger than {_MOST_BYTES >> 20} MiB", where=where, hint=hint)
        return raw
    except FileNotFoundError:
        local_path(where)  # raises where it is an address
        raise DataError("no such file", where=where, hint=f"check the path given to {role}") from None
    except IsADirectoryError:
        raise DataError("is a folder, not a file", where=where, hint="give one file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=where) from None
