"""Read a data file whole into rows: JSON in its common forms, CSV, Parquet, compressed or not."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qunlearn.data.csv_rows import csv_rows
from qunlearn.data.file_types import HEAD_BYTES, PACKED_ENDINGS, check_holds_rows, is_parquet, parquet_rows, unpacked
from qunlearn.data.row_shapes import kind
from qunlearn.errors import ConfigError, DataError

_MAX_ROW_CHARS = 10_000_000
_MOST_BYTES, _LARGE_BYTES = 1 << 30, 64 << 20
_LISTS = ("data", "rows", "examples", "train")  # of a list of rows inside an object, the usual names first
_LINES = (".jsonl", ".ndjson")
_UNREADABLE = "not JSON that can be read: nested too deeply, or a number too long"
_JSON_HINT = "one JSON object a line, or one list of objects"
_CSV_HINT = "the first line of a CSV file names its columns, such as prompt,completion; a cell with line breaks or "
_CSV_HINT += "separators in it stands in quotation marks"
_TEXT_HINT = "`qunlearn data import text FILE -o bad.jsonl` cuts a text into rows; a file of rows is JSONL or CSV"
_URL = re.compile(r"(https?|ftp|s3|gs|hf):/", re.IGNORECASE)  # Path() makes one slash of two
# Fields of a row: an object that has one of them is a row, or holds its columns.
_ROW_FIELDS = {"prompt", "question", "instruction", "input", "query", "text", "messages", "conversations", "completion"}
_ROW_FIELDS |= {"chosen", "answer", "output", "response"}


@dataclass
class Found:
    """The rows of a file with their lines, and what is no row; `hint`: what such a file looks like."""

    raw: bytes
    hint: str = _JSON_HINT
    rows: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)


def local_path(text: str) -> Path:
    """Return the path that a text names, ~ being the home. Raises ConfigError for an address."""
    if _URL.match(text):
        hint = "download it, and give the file; `qunlearn data import` reads hub:OWNER/NAME"
        raise ConfigError("is an address, not a file", where=text[:200], hint=hint)
    return Path(os.path.expanduser(text))  # noqa: PTH111 - what is no home stays as it is


def read_file(path: Path, role: str) -> Found:
    """Read a file whole. Raises DataError where it holds no text."""
    where, raw = str(path), content(path, role)
    check_holds_rows(raw[:HEAD_BYTES], where)
    found = Found(raw)
    if is_parquet(raw):
        found.rows = list(parquet_rows(io.BytesIO(raw), where))
        return found
    if len(raw) > _LARGE_BYTES and b"\0" in raw:  # the hole of a sparse file: no text, and a lot of it
        raise DataError("holds NUL characters: it is no text", where=where, hint="give JSONL, JSON or CSV")
    _read(_decode(raw, where), path, found)
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


def _decode(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = "save the file as UTF-8"
        raise DataError(f"not UTF-8 (byte {raw[error.start]:#04x})", where=f"{path}:{line}", hint=hint) from None


def _read(text: str, path: Path, found: Found) -> None:
    endings = [s.lower() for s in path.suffixes if s.lower() not in PACKED_ENDINGS]
    ending = endings[-1] if endings else ""
    start = text.lstrip()[:1]
    if ending in (".csv", ".tsv") or (ending not in (".json", *_LINES) and start not in ("{", "[")):
        if ending in (".txt", ".md") and not _looks_tabular(text):
            raise DataError("is a plain text, not rows", where=str(path), hint=_TEXT_HINT)
        _csv(text, path, found)
    elif start == "[" and ending in _LINES and not _is_list_of_objects(text):
        _lines(text, found)
    elif ending == ".json" or start == "[":
        _json(text, found)
    else:
        _lines(text, found)


# -- CSV -------------------------------------------------------------------------------------------------


def _looks_tabular(text: str) -> bool:
    """Return whether a text's first line could name columns that a row has."""
    header = text.lstrip().split("\n", 1)[0].lower()
    return any(c in header for c in ",;\t|") and any(name in header for name in _ROW_FIELDS)


def _csv(text: str, path: Path, found: Found) -> None:
    found.hint = _CSV_HINT
    try:
        rows = csv_rows(io.StringIO(text, newline=""), path, _MAX_ROW_CHARS, lambda *p: found.problems.append(p))
        found.rows.extend(rows)
    except DataError as error:
        line = (error.where or "").rpartition(":")[2]
        if not line.isdecimal():
            raise
        found.problems.append((int(line), error.message))


# -- JSON ------------------------------------------------------------------------------------------------


def _lines(text: str, found: Found) -> None:
    # Only line feeds end a line: U+2028 and others may stand inside a JSON text.
    lines = text.split("\n")
    if _is_in_pieces(lines) and (values := _sequence(text)) is not None:
        _add(values, found)
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(line) > _MAX_ROW_CHARS:
            found.problems.append((number, f"a row of {len(line)} characters is too long"))
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            found.problems.append((number, f"not JSON: {error.msg}, column {error.colno}"))
        except (RecursionError, ValueError):
            found.problems.append((number, _UNREADABLE))
        else:
            _add([(number, value)], found)


def _is_in_pieces(lines: list[str]) -> bool:
    """Return whether the first object goes over several lines, as in a file that was printed for people."""
    first = next((line for line in lines if line.strip()), "")
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        return error.pos >= len(first.rstrip()) or first.strip() in ("{", "[")
    except (RecursionError, ValueError):
        return False
    return False


def _sequence(text: str) -> list[tuple[int, Any]] | None:
    """(line, value) of JSON values one after the other, whatever is printed over several lines; None where one is
    broken."""
    values: list[tuple[int, Any]] = []
    decoder, at, line, counted = json.JSONDecoder(), 0, 1, 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at >= len(text):
            return values
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (RecursionError, ValueError):
            return None
        values.append((line, value))


def _json(text: str, found: Found) -> None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects under the name .json, a line each or printed for people
            _several(text, found)
        else:
            found.problems.append((error.lineno, f"not JSON: {error.msg}, column {error.colno}"))
        return
    except (RecursionError, ValueError):
        found.problems.append((1, _UNREADABLE))
        return
    if isinstance(value, dict):
        value = _inside(value, found)
    if isinstance(value, list):
        _add([(number, _served(row, number, found)) for number, row in enumerate(value, 1)], found, "row {0} is ")
    elif value is not None:
        found.problems.append((1, f"not a list of objects but {kind(value)}"))


def _several(text: str, found: Found) -> None:
    values = _sequence(text)
    if values is None:
        _lines(text, found)
    else:
        _add(values, found)


def _add(values: list[tuple[int, Any]], found: Found, what: str = "") -> None:
    for number, value in values:
        if isinstance(value, dict):
            found.rows.append((number, value))
        elif value is not None or not what:
            found.problems.append((number, f"{what.format(number)}not an object but {kind(value)}"))


def _is_list_of_objects(text: str) -> bool:
    try:
        value = json.loads(text)
    except (RecursionError, ValueError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _inside(value: dict[str, Any], found: Found) -> list[Any] | None:
    """The rows that one object holds: itself, its columns, or a list of them. None where that is a problem."""
    plain = {str(name).strip().lower() for name in value}
    if _ROW_FIELDS & plain:
        return _columns(value, found)
    lists = [name for name, rows in value.items() if isinstance(rows, list) and all(isinstance(r, dict) for r in rows)]
    if "rows" in lists and "features" in lists:  # as the data sets' server answers
        lists = ["rows"]
    if len(lists) > 1:
        named = ", ".join(repr(str(name)[:30]) for name in lists[:8])
        found.problems.append((1, f"holds several lists of rows: {named}; give a file with one of them"))
        return None
    if lists:
        return list(value[lists[0]])
    usual = [value[name] for name in _LISTS if isinstance(value.get(name), list)]
    return usual[0] if usual else [value]


def _columns(value: dict[str, Any], found: Found) -> list[Any] | None:
    """The rows of an object of columns, each a list, or an object by row number; a row is itself."""
    columns = {name: list(c.values()) if isinstance(c, dict) else c for name, c in value.items()}
    plain = all(isinstance(c, list) and not any(isinstance(v, dict) for v in c) for c in columns.values())
    if not plain:
        return [value]
    if len({len(c) for c in columns.values()}) > 1:
        found.problems.append((1, f"holds columns of different lengths: {sorted({len(c) for c in columns.values()})}"))
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _served(row: Any, number: int, found: Found) -> Any:
    """A row out of what the data sets' server wraps it in."""
    if not (isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row):
        return row
    if row.get("truncated_cells"):
        found.problems.append((number, "the server has cut cells of this row: download the file itself"))
        return None
    return row["row"]
